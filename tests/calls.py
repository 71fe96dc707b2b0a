"""The stages' functions as the tests call them: with keyword arguments, which their settings read."""

from typing import Any


def extract_features(images: Any, encoder: Any, out: Any, **options: Any) -> None:
    from digit_ds.preparation.features import extract_features as function
    from digit_ds.preparation.settings import FeatureSettings

    function(FeatureSettings.read({"images": images, "encoder": encoder, "out": out, **options}))


def tokenize_images(images: Any, encoder: Any, codebook: Any, vqgan: Any, out: Any, **options: Any) -> None:
    from digit_ds.preparation.settings import TokenSettings
    from digit_ds.preparation.tokens import tokenize_images as function

    parts = {"images": images, "encoder": encoder, "codebook": codebook, "vqgan": vqgan, "out": out}
    function(TokenSettings.read(parts | options))


def train_kmeans(features: Any, clusters: int, out: Any, **options: Any) -> dict[str, Any]:
    from digit_ds.clustering.kmeans import train_kmeans as function
    from digit_ds.clustering.settings import KMeansSettings

    return function(KMeansSettings.read({"features": features, "clusters": clusters, "out": out, **options}))


def sample(out: Any, **options: Any) -> None:
    from digit_ds.generation.sample import sample as function
    from digit_ds.generation.settings import SampleSettings

    function(SampleSettings.read({"out": out, **options}))


def evaluate(generated: Any, reference: Any, out: Any, **options: Any) -> dict[str, Any]:
    from digit_ds.evaluation.fidelity import evaluate as function
    from digit_ds.evaluation.settings import EvaluateSettings

    return function(EvaluateSettings.read({"generated": generated, "reference": reference, "out": out, **options}))


def save_statistics(reference: Any, out: Any, **options: Any) -> None:
    from digit_ds.evaluation.fidelity import save_statistics as function
    from digit_ds.evaluation.settings import StatisticsSettings

    function(StatisticsSettings.read({"reference": reference, "out": out, **options}))


def search_guidance(out: Any, **options: Any) -> dict[str, Any]:
    from digit_ds.tuning.guidance import search_guidance as function
    from digit_ds.tuning.settings import GuidanceSettings

    return function(GuidanceSettings.read({"out": out, **options}))


def probe(model: Any, train: Any, val: Any, out: Any, **options: Any) -> dict[str, Any]:
    from digit_ds.evaluation.linear_probe import probe as function
    from digit_ds.evaluation.settings import ProbeSettings

    return function(ProbeSettings.read({"model": model, "train": train, "val": val, "out": out, **options}))


def export(run: Any, out: Any, ema: bool = False) -> None:
    from digit_ds.training.export import export as function
    from digit_ds.training.settings import ExportSettings

    function(ExportSettings.read({"run": run, "out": out, "ema": ema}))


def estimate(recipe: Any, **options: Any) -> None:
    from digit_ds.training.estimate import estimate as function
    from digit_ds.training.settings import EstimateSettings

    function(EstimateSettings.read({"recipe": "given", **options}), recipe)


def from_official(checkpoint: Any, out: Any, **options: Any) -> Any:
    from digit_ds.model.official import from_official as function
    from digit_ds.model.settings import FromOfficial

    if "carry" in options:
        options["drop_carried"] = not options.pop("carry")
    return function(FromOfficial.read({"checkpoint": checkpoint, "out": out, **options}))


def to_official(model: Any, out: Any, **options: Any) -> list[str]:
    from digit_ds.model.official import to_official as function
    from digit_ds.model.settings import ToOfficial

    return function(ToOfficial.read({"model": model, "out": out, **options}))


def doctor(folder: Any, shards: Any = None) -> None:
    from digit_ds.health.doctor import doctor as function
    from digit_ds.health.settings import DoctorSettings

    function(DoctorSettings.read({"folder": folder, "shards": shards}))


def run_demo(out: Any, small: bool = False) -> None:
    from digit_ds.demo.run import run as function
    from digit_ds.demo.settings import DemoSettings

    function(DemoSettings.read({"out": out, "small": small}))
