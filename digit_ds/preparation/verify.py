"""Checking token shards: every byte, every id, every view."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from digit_ds.data.shards import ShardManifest, read_index, read_manifest, read_shard
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.parallel.progress import progress


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


def verify_shards(directory: Path | str) -> Report:
    """Check hashes, counts, order of images and views, labels and id ranges of a local shard directory.

    Raises:
        UserError: names the first shard file that is damaged, missing or not what the manifest says.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    index = directory / "index.json"
    if sha256(index) != manifest.index_sha256:
        raise UserError(f"{index}: is damaged, its sha256 is not that of manifest.json")
    sizes = {"discriminative": manifest.discriminative_codes}
    if manifest.vq_codes:
        sizes["vq"] = manifest.vq_codes
    counts = {kind: np.zeros(size, np.int64) for kind, size in sizes.items()}
    labels = np.zeros(len(manifest.classes), np.int64)
    seen, last = 0, -1
    shards = read_index(directory)
    with progress(total=manifest.samples, description="verify", unit="samples") as bar:
        for shard in shards:
            name = directory / (shard["zip_data"] or shard["raw_data"])["basename"]
            for sample in read_shard(directory, shard):
                view = seen % manifest.views
                if sample["view"] != view or (sample["index"] <= last if view == 0 else sample["index"] != last):
                    raise UserError(
                        f"{name}: image {sample['index']} view {sample['view']} stands where view {view} of "
                        f"{'the next image' if view == 0 else f'image {last}'} is expected"
                    )
                last = sample["index"]
                _check_sample(name, sample, manifest, counts)
                if sample["label"] >= 0:
                    labels[sample["label"]] += view == 0
                seen += 1
                bar.update()
    if seen != manifest.samples:
        raise UserError(
            f"{directory}: holds {seen} samples, expected {manifest.samples} ({manifest.images} images x "
            f"{manifest.views} views) by manifest.json"
        )
    return Report(manifest, {kind: Usage(count) for kind, count in counts.items()}, labels)


def _check_sample(name: Path, sample: dict[str, Any], manifest: ShardManifest, counts: dict[str, np.ndarray]) -> None:
    """Check one sample's label and ids, and count the ids."""
    if not -1 <= sample["label"] < len(manifest.classes):
        raise UserError(
            f"{name}: image {sample['image_id']!r} has label {sample['label']}, "
            f"expected -1 to {len(manifest.classes) - 1}"
        )
    for kind, count in counts.items():
        codes = sample[kind]
        if codes.shape != (manifest.tokens,):
            raise UserError(
                f"{name}: image {sample['image_id']!r} has {kind} tokens of shape {list(codes.shape)}, "
                f"expected [{manifest.tokens}]"
            )
        if codes.max() >= len(count):
            raise UserError(
                f"{name}: image {sample['image_id']!r} has the {kind} code {codes.max()}, "
                f"expected 0 to {len(count) - 1}"
            )
        np.add.at(count, codes, 1)


def describe(report: Report) -> str:
    """The report in a few lines for people."""
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
