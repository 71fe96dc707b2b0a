"""Checking token shards: every byte, every id, every view."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from digit_ds.data.shards import ShardManifest, read_index, read_manifest, read_shard
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.parallel.progress import progress
from digit_ds.parallel.workers import ignore_stop_signals
from digit_ds.preparation.jobs import default_workers


@dataclass
class Usage:
    """How often each code occurs."""

    counts: np.ndarray  # int64 [K]

    @property
    def used(self) -> int:
        """Codes that occur at all."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes: how many equally frequent codes would be as hard to guess."""
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass
class Report:
    """What a complete check found."""

    manifest: ShardManifest
    usage: dict[str, Usage]
    """Per kind of token."""
    labels: np.ndarray
    """Images per class, int64 [classes]."""


@dataclass
class _Shard:
    """What one shard holds."""

    first: tuple[int, int]
    """Image number and view of its first sample."""
    last: tuple[int, int]
    """The same of its last one."""
    samples: int
    counts: dict[str, np.ndarray]
    labels: np.ndarray


def verify_shards(directory: Path | str, workers: int | None = None) -> Report:
    """Check hashes, counts, order of images and views, labels and id ranges of a local shard directory.

    Args:
        directory: the shards.
        workers: processes that read shards. Default: all of the machine's cores.

    Raises:
        UserError: names the first shard file that is damaged, missing or not what the manifest says.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    index = directory / "index.json"
    if sha256(index) != manifest.index_sha256:
        raise UserError(f"{index}: is damaged, its sha256 is not that of manifest.json")
    counts = {kind: np.zeros(size, np.int64) for kind, size in _sizes(manifest).items()}
    labels = np.zeros(len(manifest.classes), np.int64)
    shards = read_index(directory)
    seen, last = 0, (-1, manifest.views - 1)
    processes = min(len(shards), default_workers() if workers is None else workers)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(total=len(shards), description="verify", unit="shards"))
        check = partial(_check_shard, directory, manifest)
        if processes > 1:
            pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), ignore_stop_signals)
            stack.callback(pool.shutdown, cancel_futures=True)
            found = _unless_killed(directory, pool.map(check, shards))
        else:
            found = map(check, shards)
        for shard, summary in zip(shards, found):
            _check_order(_path(directory, shard), last, summary.first, manifest.views)
            last = summary.last
            seen += summary.samples
            labels += summary.labels
            for kind, count in counts.items():
                count += summary.counts[kind]
            bar.update()
    if seen != manifest.samples or last[1] != manifest.views - 1:
        raise UserError(
            f"{directory}: holds {seen} samples, expected {manifest.samples} ({manifest.images} images x "
            f"{manifest.views} views) by manifest.json"
        )
    return Report(manifest, {kind: Usage(count) for kind, count in counts.items()}, labels)


def _unless_killed(directory: Path, found: Iterator[_Shard]) -> Iterator[_Shard]:
    """What the processes found; when one of them was killed, one line."""
    try:
        yield from found
    except BrokenProcessPool as error:
        raise UserError(
            f"{directory}: a process that read its shards was killed, perhaps by the out-of-memory killer; "
            "run the same command again"
        ) from error


def _sizes(manifest: ShardManifest) -> dict[str, int]:
    """Number of codes per kind of token."""
    sizes = {"discriminative": manifest.discriminative_codes}
    return sizes | ({"vq": manifest.vq_codes} if manifest.vq_codes else {})


def _path(directory: Path, shard: dict[str, Any]) -> Path:
    return directory / (shard["zip_data"] or shard["raw_data"])["basename"]


def _check_shard(directory: Path, manifest: ShardManifest, shard: dict[str, Any]) -> _Shard:
    """Check all that can be checked of one shard alone."""
    name, samples = _path(directory, shard), read_shard(directory, shard)
    if len(samples) != shard["samples"] or not samples:
        raise UserError(f"{name}: holds {len(samples)} samples, expected {shard['samples']} by index.json")
    places = [(sample["index"], sample["view"]) for sample in samples]
    for one, other in pairwise(places):
        _check_order(name, one, other, manifest.views)
    labels = np.array([sample["label"] for sample in samples])
    if labels.min() < -1 or labels.max() >= len(manifest.classes):
        raise UserError(
            f"{name}: holds the labels {labels.min()} to {labels.max()}, expected -1 to {len(manifest.classes) - 1}"
        )
    counts = {}
    for kind, size in _sizes(manifest).items():
        if any(sample[kind].shape != (manifest.tokens,) for sample in samples):
            raise UserError(
                f"{name}: holds {kind} tokens of another shape, expected [{manifest.tokens}] of each sample"
            )
        codes = np.stack([sample[kind] for sample in samples])  # [samples, G]
        if codes.max() >= size:
            raise UserError(f"{name}: holds the {kind} code {codes.max()}, expected 0 to {size - 1}")
        counts[kind] = np.bincount(codes.ravel(), minlength=size)
    first_views = labels[[view == 0 for _, view in places]]
    per_class = np.bincount(first_views[first_views >= 0], minlength=len(manifest.classes))
    return _Shard(places[0], places[-1], len(samples), counts, per_class)


def _check_order(name: Path, before: tuple[int, int], place: tuple[int, int], views: int) -> None:
    """Check that image and view ``place`` may follow ``before``: all views of an image, then a later image."""
    (last, last_view), (image, view) = before, place
    follows = (image == last and view == last_view + 1) if last_view < views - 1 else (image > last and view == 0)
    if not follows:
        expected = f"view {last_view + 1} of image {last}" if last_view < views - 1 else "view 0 of a later image"
        raise UserError(f"{name}: image {image} view {view} stands where {expected} is expected")


def describe(report: Report) -> str:
    """The report in a few human-readable lines."""
    manifest = report.manifest
    lines = [
        f"{manifest.images} images x {manifest.views} views ({manifest.crops}), {manifest.skipped} skipped, "
        f"{len(manifest.classes)} classes, grid {manifest.grid[0]} x {manifest.grid[1]}"
    ]
    if len(report.labels):
        lines.append(f"images per class: {report.labels.min()} to {report.labels.max()}")
    for kind, usage in report.usage.items():
        lines.append(
            f"{kind} tokens: {usage.used} of {len(usage.counts)} codes used, perplexity {usage.perplexity:.1f}"
        )
    return "\n".join(lines)
