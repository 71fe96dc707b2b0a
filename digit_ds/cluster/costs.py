"""What the steps of a chain cost, roughly: hours on H100 at measured rates, and what they leave on disk."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from digit_ds.cluster.chain import Chain, Site, Step, recipe_of
from digit_ds.clustering.settings import KMeansSettings
from digit_ds.errors import UserError
from digit_ds.training.estimate import disk_of, shards_to_come
from digit_ds.training.plan import predicted_hours
from digit_ds.training.runs import model_spec
from digit_ds.training.settings import PlanSettings

IMAGENET = 1_281_167
# Images a second of one H100, measured (docs/results.md, "Speed").
DECODING = {"cpu": 2000.0, "gpu": 7000.0}
"""Features or discriminative tokens from JPEG files, by ``--decoder``."""
BOTH_TOKENS = 1400.0
SAMPLES = {"fp32": 49.0, "fp16": 150.0, "bf16": 122.0}
"""Pictures of the base models, by ``--vqgan-precision``."""
KMEANS_SECONDS = 0.051 / (2_097_152 * 8192)
"""An iteration, a point and cluster."""
GRID = 16
"""Rows of the token grid, at most."""
WIDTH = 768
"""Of DINOv2-B's features: the encoder is not read here."""
PICTURE_BYTES = 110_000


class Cost(NamedTuple):
    """Of one step; None: not known."""

    hours: float | None
    """On all GPUs of the step."""
    gibibytes: float | None


def costs(chain: Chain, site: Site, chain_steps: list[Step], images: int) -> dict[str, Cost]:
    """Cost of each step by name, for ``images`` training images; hours only where the step has GPUs."""
    return {step.name: _cost(step, chain, site, images) for step in chain_steps}


def _cost(step: Step, chain: Chain, site: Site, images: int) -> Cost:
    wanted = site.resources(step.name)
    gpus = wanted["nodes"] * wanted["gpus_per_node"]
    if step.name in ("prior", "decoder"):
        return _training(step, chain, images, gpus, wanted["gpus_per_node"])
    known: dict[str, Callable[[], tuple[float, float]]] = {
        "features": lambda: _features(step, images),
        "kmeans": lambda: _kmeans(step, chain, images),
        "tokenize": lambda: _tokens(step, images),
        "sample": lambda: _samples(step, chain),
    }
    if step.name not in known:
        return Cost(None, None)
    seconds, size = known[step.name]()
    return Cost(seconds / gpus / 3600 if gpus else None, size / 2**30)


def _number(options: Mapping[str, Any], name: str, default: float = 0) -> float:
    """An option that is a number, or what holds without it."""
    value = options.get(name)
    return default if value is None else float(value)


def _points(options: Mapping[str, Any]) -> float:
    """Patches kept of each image of a 16 x 16 grid."""
    return _number(options, "points") or 256 * _number(options, "fraction", 1.0)


def _features(step: Step, images: int) -> tuple[float, float]:
    kept = images * _points(step.options) * WIDTH * (4 if step.options.get("dtype") == "fp32" else 2)
    return images / DECODING[step.options.get("decoder", "cpu")], kept


def _kmeans(step: Step, chain: Chain, images: int) -> tuple[float, float]:
    clusters = _number(step.options, "clusters")
    work = (
        images
        * _points(chain.features)
        * clusters
        * _number(step.options, "iterations", KMeansSettings.model_fields["iterations"].default)
    )
    return KMEANS_SECONDS * work, clusters * WIDTH * 4


def _tokens(step: Step, images: int) -> tuple[float, float]:
    views = images * _number(step.options, "views", 10 if step.options.get("crops") == "ten-crop" else 1)
    if step.options.get("vqgan"):
        return views / BOTH_TOKENS, views * (2 * 256 * 2 + 40)
    return views / DECODING[step.options.get("decoder", "cpu")], views * (256 * 2 + 40)


def _training(step: Step, chain: Chain, images: int, gpus: int, per_host: int) -> Cost:
    """Hours as ``digit-ds plan`` predicts them for the recipe's own layout."""
    training = getattr(chain, step.name)
    recipe = recipe_of(training)
    # As many tokens as the model has positions for: the encoder and the images are not read here.
    side = min(GRID, math.isqrt(recipe.model.max_positions - 1))
    shards = shards_to_come(images, side, int(_number(chain.kmeans, "clusters")), vq_codes=1024, classes=1000)
    spec = model_spec(recipe, shards)
    size = sum(disk_of(recipe, spec))
    if not gpus:
        return Cost(None, size)
    layout = PlanSettings.read({"recipe": training.recipe, "gpus": gpus, "per_host": per_host})
    try:
        return Cost(predicted_hours(layout, recipe, spec), size)
    except UserError:  # it does not fit an H100, and the site's GPUs are not known here
        return Cost(None, size)


def _samples(step: Step, chain: Chain) -> tuple[float, float]:
    count = _number(step.options, "count") or 1000 * _number(step.options, "per_class")
    return count / SAMPLES[step.options.get("vqgan_precision", "fp32")], count * PICTURE_BYTES


def table(chain: Chain, site: Site, chain_steps: list[Step], images: int) -> list[str]:
    """A line for each step: nodes, GPUs, hours on them, disk; a line with the sums, and what they rest on."""
    found, all_hours = costs(chain, site, chain_steps, images), 0.0
    lines = [f"{'step':20} {'nodes':>5} {'GPUs':>5} {'hours':>8} {'GPU-hours':>9} {'disk GiB':>9}"]
    for step in chain_steps:
        wanted, cost = site.resources(step.name), found[step.name]
        gpus = wanted["nodes"] * wanted["gpus_per_node"]
        hours = "-" if cost.hours is None else f"{cost.hours:.2f}"
        total = "-" if cost.hours is None else f"{cost.hours * gpus:.1f}"
        all_hours += (cost.hours or 0.0) * gpus
        size = "-" if cost.gibibytes is None else f"{cost.gibibytes:.1f}"
        lines.append(f"{step.name:20} {wanted['nodes']:5} {gpus:5} {hours:>8} {total:>9} {size:>9}")
    all_sizes = sum(cost.gibibytes or 0.0 for cost in found.values())
    lines.append(f"{'all':20} {'':5} {'':5} {'':8} {all_hours:9.1f} {all_sizes:9.1f}")
    lines.append(f"for {images:,} images; -: not estimated; rates measured on H100: features and tokens in bf16 with")
    lines.append(
        "compile: true (other options are slower), training in the recipe's layout as digit-ds plan predicts it"
    )
    return lines
