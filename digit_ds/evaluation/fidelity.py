"""``digit-ds evaluate``: FID, FDD, Inception Score, precision and recall by torch-fidelity, and class accuracy."""

import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_featuresdict_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_featuresdict_to_metric
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id_cached

from digit_ds.data.feature_network import FeatureNetwork, load_feature_network
from digit_ds.errors import UserError
from digit_ds.evaluation.extractors import Extractor, dinov2, open_extractor
from digit_ds.evaluation.pictures import Array, Pictures, Statistics, describe_sides, open_pictures
from digit_ds.evaluation.settings import EvaluateSettings, StatisticsSettings
from digit_ds.files import read_json, write_atomically, write_json
from digit_ds.identity import Part, check_classes
from digit_ds.parallel import shared_memory
from digit_ds.parallel.workers import worker_errors_in_one_line
from digit_ds.safe_load import load_npz

ENOUGH = 50_000
"""Samples below which FID is biased upwards too much to be compared with published figures."""
SPLITS = 10
"""Parts over which the Inception Score is averaged."""
BATCH = 64
"""Default number of pictures of one forward pass."""
NEIGHBOURS = 3
"""Nearest neighbours that span the manifolds of precision and recall (torch-fidelity's default)."""
LOADERS, AHEAD = 4, 2
"""Loading processes that torch-fidelity starts, and batches that each has ready."""
FEW = 5_000
"""Below this many pictures, starting loader processes takes longer than decoding."""


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Score generated pictures against a reference, print the figures and write them to ``out_json``.

    Returns:
        What ``out_json`` holds: ``fid``, ``fdd``, ``inception_score``, ``inception_score_std``, ``precision``,
        ``recall``, ``class_accuracy`` (those asked for), what to call the distances (``fid_label``, ``fdd_label``) and
        what they were computed from.

    Raises:
        UserError: an input is missing or does not fit.
    """
    samples = open_pictures(settings.generated)
    if isinstance(samples, Statistics):
        raise UserError(f"{settings.generated}: holds statistics, expected generated pictures")
    against = open_pictures(settings.reference, settings.preparation, settings.size)
    _check_comparable(samples, against, settings.precision_recall)
    extractor = None if settings.fdd_alone else open_extractor(settings.inception_weights, settings.features)
    encoder = None if settings.dinov2_weights is None else dinov2(settings.dinov2_weights)
    judged = None if settings.classifier is None else _classifier(settings.classifier, settings.labels, len(samples))
    with worker_errors_in_one_line():
        figures: dict[str, Any] = {}
        if extractor is not None:
            figures |= _figures(samples, against, extractor, settings.precision_recall, settings.cache, settings.batch)
            figures |= {"fid_label": _label("FID", len(samples)), "features": extractor.description}
        if encoder is not None:
            theirs = _reference_statistics(against, encoder, settings.batch, settings.cache)
            found = _features(samples, encoder, ["fid"], settings.cache, settings.batch)
            figures["fdd"] = _fid(found, theirs, against.name, encoder)
            figures |= {"fdd_label": _label("FDD", len(samples)), "fdd_features": encoder.description}
        if judged is not None:
            figures["class_accuracy"] = class_accuracy(samples, *judged, settings.batch)
    result = {
        **figures,
        "samples": len(samples),
        "generated": samples.name,
        "reference": against.name,
        "reference_name": _reference_name(settings.reference_name, against),
        "reference_samples": None if isinstance(against, Statistics) else len(against),
        "classifier": None if settings.classifier is None else str(settings.classifier),
        "warning": _warning(len(samples)),
    }
    write_json(settings.out, result)
    _print(result)
    return result


def save_statistics(settings: StatisticsSettings) -> None:
    """Write mean and covariance of a reference's features to an ``.npz``, for ``evaluate(reference=...)``.

    The file also names the network, so that it cannot be compared with another one's features.

    Raises:
        UserError: the reference is none of pictures, the network is missing, or ``out`` does not end in ``.npz``.
    """
    if Path(settings.out).suffix != ".npz":
        raise UserError(f"{settings.out}: is not a valid name for statistics, expected a name that ends in .npz")
    pictures = open_pictures(settings.reference, settings.preparation, settings.size)
    if isinstance(pictures, Statistics):
        raise UserError(f"{settings.reference}: holds statistics already, expected pictures")
    if settings.fdd_alone:
        extractor = dinov2(cast(str, settings.dinov2_weights))
    else:
        extractor = open_extractor(settings.inception_weights, settings.features)
    with worker_errors_in_one_line():
        found = _reference_statistics(pictures, extractor, settings.batch)
    name = _reference_name(settings.reference_name, pictures)
    said = {"network": extractor.name, "reference": name}
    write_atomically(settings.out, lambda temporary: np.savez(temporary, **found, **said))
    of = f"{len(pictures):,} pictures of {_with_path(name, pictures.name)}"
    print(f"{settings.out}: mean and covariance of {of}; {extractor.description}")


class OnlineFid:
    """FID of pictures of a model in training against one reference, whose statistics are computed once.

    The files are read where figures are asked for, which may be a process that this was pickled to.

    Args:
        reference: folder or ``.npz`` of pictures, or ``.npz`` of statistics (``mu``, ``sigma``).
        inception_weights: local file of torch-fidelity's Inception weights; or
        features: a feature network.

    Raises:
        UserError: a file is missing or does not fit.
    """

    def __init__(
        self,
        reference: Path | str,
        *,
        inception_weights: Path | str | None = None,
        features: Path | str | None = None,
    ):
        self._files = reference, inception_weights, features
        self._opened: tuple[Pictures | Statistics, Extractor, dict[str, np.ndarray]] | None = None
        self._open()  # what cannot be used is refused before training starts

    def figures(self, pictures: np.ndarray) -> dict[str, float]:
        """``online_fid_N`` of N pictures uint8 [N, H, W, 3]: the number is in the name, since FID grows as N falls."""
        samples = Array(pictures, "pictures of a model in training")
        if self._opened is None:
            reference, extractor = self._open()
            _check_comparable(samples, reference)
            with worker_errors_in_one_line():
                self._opened = reference, extractor, _reference_statistics(reference, extractor, BATCH)
        reference, extractor, statistics = self._opened
        _check_comparable(samples, reference)
        found = _features(samples, extractor, ["fid"], None, BATCH)
        return {f"online_fid_{len(samples)}": _fid(found, statistics, reference.name, extractor)}

    def _open(self) -> tuple[Pictures | Statistics, Extractor]:
        reference, inception_weights, features = self._files
        return open_pictures(reference), open_extractor(inception_weights, features)


def _check_comparable(samples: Pictures, against: Pictures | Statistics, precision_recall: bool = False) -> None:
    """Refuse sets whose scores would mean nothing: of different sizes, or with fewer pictures than neighbours."""
    if isinstance(against, Statistics):
        return
    if samples.sides != against.sides:
        raise UserError(
            f"{against.name}: its pictures have {describe_sides(against.sides)} pixels and those of {samples.name} "
            f"{describe_sides(samples.sides)}, expected one size: --preparation and --size resize a reference folder"
        )
    for pictures in (samples, against) if precision_recall else ():
        if len(pictures) <= NEIGHBOURS:
            raise UserError(
                f"{pictures.name}: holds {len(pictures)} pictures, expected more than {NEIGHBOURS} for precision and "
                "recall"
            )


def class_accuracy(pictures: Pictures, network: FeatureNetwork, labels: np.ndarray, batch: int) -> float:
    """Share of pictures that a feature network assigns to the class that was asked for."""
    with torch.inference_mode():
        chosen = [network(part)[1].argmax(-1) for part in DataLoader(cast(Dataset, pictures), batch)]
    return float((torch.cat(chosen).numpy() == labels).mean())


def _figures(
    samples: Pictures,
    against: Pictures | Statistics,
    extractor: Extractor,
    precision_recall: bool,
    cache: Path | str | None,
    batch: int,
) -> dict[str, float]:
    """FID and Inception Score, and on request precision and recall, as torch-fidelity computes them."""
    names = {"fid": "frechet_inception_distance", "inception_score": "inception_score_mean"}
    names |= {"inception_score_std": "inception_score_std"}
    if isinstance(against, Statistics):
        if precision_recall:
            raise UserError(
                f"{against.name}: holds statistics, expected the reference's pictures for precision and recall"
            )
        theirs = _reference_statistics(against, extractor, batch)
        found = _features(samples, extractor, ["fid", "isc"], cache, batch)
        metrics = {names["fid"]: _fid(found, theirs, against.name, extractor)}
        settings = _settings(samples, None, extractor, cache, batch)
        metrics |= isc_featuresdict_to_metric(found, extractor.layers["isc"], **settings)
    else:
        settings = _settings(samples, against, extractor, cache, batch)
        metrics = calculate_metrics(**settings, fid=True, isc=True, prc=precision_recall)
        if precision_recall:
            names |= {"precision": "precision", "recall": "recall"}
    return {ours: float(metrics[theirs]) for ours, theirs in names.items()}


def _reference_statistics(
    reference: Pictures | Statistics, extractor: Extractor, batch: int, cache: Path | str | None = None
) -> dict[str, np.ndarray]:
    """Mean and covariance of a reference, saved or computed."""
    if isinstance(reference, Statistics):
        if reference.network not in (None, extractor.name):
            raise UserError(f"{reference.name}: holds statistics of {reference.network}, expected {extractor.name}")
        return {"mu": reference.mean.astype(np.float64), "sigma": reference.covariance.astype(np.float64)}
    return _statistics(_features(reference, extractor, ["fid"], cache, batch), extractor)


def _fid(
    features: dict[str, torch.Tensor], reference: dict[str, np.ndarray], reference_name: str, extractor: Extractor
) -> float:
    """FID of pictures' features against a reference's mean and covariance."""
    ours = _statistics(features, extractor)
    for name, value in reference.items():
        found, expected = list(value.shape), list(ours[name].shape)
        if found != expected:
            raise UserError(f"{reference_name}: {name} is {found}, but that of {extractor.name} is {expected}")
    return float(fid_statistics_to_metric(ours, reference, verbose=False)["frechet_inception_distance"])


def _settings(
    samples: Pictures, against: Pictures | None, extractor: Extractor, cache: Path | str | None, batch: int
) -> dict[str, Any]:
    """Keyword arguments of torch-fidelity. Its own download of weights is never reached: the extractor names a file."""
    settings = {
        **extractor.arguments,
        **{f"feature_layer_{metric}": layer for metric, layer in extractor.layers.items()},
        "input1": samples,
        "input2": against,
        "isc_splits": min(SPLITS, len(samples)),
        "cuda": torch.cuda.is_available(),
        "batch_size": batch,
        "save_cpu_ram": len(samples) < FEW or not _room_for_loaders(samples, batch),
        "cache": cache is not None,
        "verbose": sys.stderr.isatty(),
    }
    if cache is not None:
        settings["cache_root"] = str(cache)
        for slot, pictures in (("input1", samples), ("input2", against)):
            if pictures is not None:
                settings[f"{slot}_cache_name"] = f"{pictures.content_hash[:24]}-{extractor.name}"
    return settings


def _room_for_loaders(samples: Pictures, batch: int) -> bool:
    """Whether the batches of torch-fidelity's loading processes fit into shared memory; one process loads otherwise."""
    height, width = samples.sides
    needed = LOADERS * (AHEAD + 1) * batch * 3 * height * width
    problem = shared_memory.shortage(needed)
    if problem:
        print(f"warning: {problem}; until then one process loads the pictures", file=sys.stderr)
    return problem is None


def _features(
    pictures: Pictures, extractor: Extractor, metrics: list[str], cache: Path | str | None, batch: int
) -> dict[str, torch.Tensor]:
    """Features of all pictures, by layer."""
    settings = _settings(pictures, None, extractor, cache, batch)
    name = settings.pop("feature_extractor")
    layers = sorted({extractor.layers[metric] for metric in metrics})
    network = create_feature_extractor(name, layers, **settings)
    return extract_featuresdict_from_input_id_cached(1, network, **settings)


def _statistics(features: dict[str, torch.Tensor], extractor: Extractor) -> dict[str, np.ndarray]:
    """Mean and covariance in float64."""
    found = fid_featuresdict_to_statistics(features, extractor.layers["fid"])
    return {name: value.astype(np.float64) for name, value in found.items()}


def _classifier(path: Path | str, labels: Path | str | None, count: int) -> tuple[FeatureNetwork, np.ndarray]:
    """The classifier and the labels of the generated pictures, int64 [N].

    Raises:
        UserError: there is not a label for each picture, or the classifier's classes are others than those of the
            sampling job, or stand in another order.
    """
    if labels is None:
        raise UserError(f"classifier is {path}, but labels are not given, expected both (--classifier, --labels)")
    manifest: Any
    if Path(labels).suffix == ".npz":
        manifest = {"labels": load_npz(labels, "arr_1")["arr_1"]}
    else:
        manifest = read_json(labels)
    if not isinstance(manifest, dict):
        manifest = {}
    try:
        asked = np.asarray(manifest.get("labels"))
    except ValueError:  # lists of different lengths
        asked = np.empty(0)
    if asked.shape != (count,) or asked.dtype.kind not in "iu" or asked.min() < 0:
        raise UserError(
            f"{labels}: holds no labels of {count} pictures, expected a class label of each generated picture"
        )
    network = load_feature_network(path)
    check_classes([Part(f"samples {labels}", manifest), Part(f"classifier {path}", {"classes": network.class_names})])
    if int(asked.max()) >= network.classes:
        raise UserError(f"{labels}: holds label {int(asked.max())}, expected 0..{network.classes - 1} as in {path}")
    return network, asked.astype(np.int64)


def _warning(count: int) -> str | None:
    if count >= ENOUGH:
        return None
    return (
        f"{count} samples are fewer than {ENOUGH}: FID and FDD are too high and not comparable with published figures"
    )


def _label(distance: str, count: int) -> str:
    """What a distance of so many samples is called: ``FID`` from 50,000 on, ``FID-10k`` of 10,000."""
    if count >= ENOUGH:
        return distance
    return f"{distance}-{count // 1000}k" if count % 1000 == 0 else f"{distance}-{count}"


def _reference_name(given: str | None, reference: Pictures | Statistics) -> str:
    """As the user calls it; else as its saved statistics do; else its path."""
    said = reference.reference if isinstance(reference, Statistics) else None
    return given or said or reference.name


def _with_path(name: str, path: str) -> str:
    return path if name == path else f"{name} ({path})"


def _print(result: dict[str, Any]) -> None:
    """The figures, each with what it was computed from."""
    samples = f"{result['samples']:,} samples"
    count = "saved statistics" if result["reference_samples"] is None else f"{result['reference_samples']:,} pictures"
    against = f"{samples} against {count} of {_with_path(result['reference_name'], result['reference'])}"
    if "fid" in result:
        print(f"{result['fid_label']} {result['fid']:.4f} ({against}; {result['features']})")
        print(
            f"Inception Score {result['inception_score']:.4f} +- {result['inception_score_std']:.4f} "
            f"({samples}; {result['features']})"
        )
    if "fdd" in result:
        print(f"{result['fdd_label']} {result['fdd']:.4f} ({against}; {result['fdd_features']})")
    for name in ("precision", "recall"):
        if name in result:
            print(f"{name} {result[name]:.4f} ({against}; {result['features']})")
    if "class_accuracy" in result:
        print(f"class accuracy {result['class_accuracy']:.4f} ({samples}; {result['classifier']})")
    if result["warning"]:
        print(f"warning: {result['warning']}", file=sys.stderr)
