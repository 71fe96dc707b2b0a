"""What the steps of a chain cost, roughly: hours on H100 at measured rates, and what they leave on disk."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from digit_ds.cluster.chain import Chain, Site, Step, recipe_of
from digit_ds.clustering.settings import KMeansSettings
from digit_ds.model.weights import parameter_count
from digit_ds.training.estimate import shards_to_come
from digit_ds.training.flops import PEAKS, flops_per_image
from digit_ds.training.runs import model_spec

IMAGENET = 1_281_167
# Images a second of one H100, measured (docs/results.md, "Speed").
DECODING = {"cpu": 2000.0, "gpu": 7000.0}
"""Features or discriminative tokens from JPEG files, by ``--decoder``."""
BOTH_TOKENS = 1400.0
SAMPLES = {"fp32": 49.0, "fp16": 150.0, "bf16": 122.0}
"""Pictures of the base models, by ``--vqgan-precision``."""
TRAINING_FLOPS = PEAKS["H100"] * 1e12 * 0.43
KMEANS_SECONDS = 0.051 / (2_097_152 * 8192)
"""An iteration, a point and cluster."""
GRID = 16
"""Rows of the token grid, at most."""
WIDTH = 768
"""Of DINOv2-B's features: the encoder is not read here."""
PICTURE_BYTES = 110_000


class Cost(NamedTuple):
    """Of one step; None: not known."""

    gpu_hours: float | None
    gibibytes: float | None


def costs(chain: Chain, site: Site, chain_steps: list[Step], images: int) -> dict[str, Cost]:
    """Cost of each step by name, for ``images`` training images; hours only where the step has GPUs."""
    found = {step.name: _cost(step, chain, images) for step in chain_steps}
    return {
        name: cost if site.resources(name)["gpus_per_node"] else Cost(None, cost.gibibytes)
        for name, cost in found.items()
    }


def _cost(step: Step, chain: Chain, images: int) -> Cost:
    known: dict[str, Callable[[], tuple[float, float]]] = {
        "features": lambda: _features(step, images),
        "kmeans": lambda: _kmeans(step, chain, images),
        "tokenize": lambda: _tokens(step, images),
        "prior": lambda: _training(step, chain, images),
        "decoder": lambda: _training(step, chain, images),
        "sample": lambda: _samples(step, chain),
    }
    if step.name not in known:
        return Cost(None, None)
    seconds, size = known[step.name]()
    return Cost(seconds / 3600, size / 2**30)


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


def _training(step: Step, chain: Chain, images: int) -> tuple[float, float]:
    recipe = recipe_of(getattr(chain, step.name))
    # As many tokens as the model has positions for: the encoder and the images are not read here.
    side = min(GRID, math.isqrt(recipe.model.max_positions - 1))
    shards = shards_to_come(images, side, int(_number(chain.kmeans, "clusters")), vq_codes=1024, classes=1000)
    spec = model_spec(recipe, shards)
    work = recipe.training.steps * recipe.training.global_batch * flops_per_image(spec)
    kept, count = recipe.checkpoint, parameter_count(spec)
    checkpoints = kept.keep_last + (recipe.training.steps // kept.keep_every if kept.keep_every else 0)
    states = 4 if recipe.training.ema_decay else 3  # float32 weights, two moments, moving average
    return work / TRAINING_FLOPS, count * 4 * (states * checkpoints + 1)


def _samples(step: Step, chain: Chain) -> tuple[float, float]:
    count = _number(step.options, "count") or 1000 * _number(step.options, "per_class")
    return count / SAMPLES[step.options.get("vqgan_precision", "fp32")], count * PICTURE_BYTES


def table(chain: Chain, site: Site, chain_steps: list[Step], images: int) -> list[str]:
    """A line for each step: nodes, GPUs, hours on them, disk; a line with the sums, and what they rest on."""
    found = costs(chain, site, chain_steps, images)
    lines = [f"{'step':20} {'nodes':>5} {'GPUs':>5} {'hours':>8} {'GPU-hours':>9} {'disk GiB':>9}"]
    for step in chain_steps:
        wanted, cost = site.resources(step.name), found[step.name]
        gpus = wanted["nodes"] * wanted["gpus_per_node"]
        hours = "-" if cost.gpu_hours is None else f"{cost.gpu_hours / gpus:.2f}"
        total = "-" if cost.gpu_hours is None else f"{cost.gpu_hours:.1f}"
        size = "-" if cost.gibibytes is None else f"{cost.gibibytes:.1f}"
        lines.append(f"{step.name:20} {wanted['nodes']:5} {gpus:5} {hours:>8} {total:>9} {size:>9}")
    all_hours, all_sizes = (sum(value or 0.0 for value in column) for column in zip(*found.values()))
    lines.append(f"{'all':20} {'':5} {'':5} {'':8} {all_hours:9.1f} {all_sizes:9.1f}")
    lines.append(f"for {images:,} images, at rates measured on H100; -: not estimated")
    return lines
