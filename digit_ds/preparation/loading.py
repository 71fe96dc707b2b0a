"""Decoding in worker processes, ahead of the device: batches of views, block by block."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from digit_ds.data.images import Crops, UnreadableImageError, decode
from digit_ds.preparation.jobs import Job

PIECE = 16
"""Images that a worker decodes at a time: small, so that the workers share the load evenly."""


class Batch(NamedTuple):
    """Views of consecutive images of one block, image by image; images that could not be read are left out."""

    block: int
    last: bool
    """Whether this is the block's last batch."""
    names: list[str]
    """Names of the images that are in the batch."""
    numbers: list[int]
    """Their 0-based numbers in the sorted list."""
    pixels: Tensor
    """uint8 [images x views, size, size, 3]."""
    extra: list[np.ndarray]
    """What ``annotate`` gave for each image."""
    skipped: list[dict[str, str]]
    """``{"image", "reason"}`` of those left out."""


class _Piece(NamedTuple):
    names: list[str]
    numbers: list[int]
    pixels: Tensor
    extra: list[np.ndarray]
    skipped: list[dict[str, str]]


class _Pieces(Dataset):
    """Item i = the decoded images of piece i: (block, first image inside it, images)."""

    def __init__(
        self, job: Job, crops: Crops, pieces: Sequence[tuple[int, int, int]], annotate: Callable | None
    ) -> None:
        self._job, self._crops, self._pieces, self._annotate = job, crops, pieces, annotate
        self._block = None

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, item: int) -> _Piece:
        number, first, count = self._pieces[item]
        if self._block is None or self._block.number != number:
            self._block = self._job.read_block(number)
        names, numbers, views, extra, skipped = [], [], [], [], []
        for position in range(first, first + count):
            name = self._block.names[position]
            try:
                name.encode("utf-8")
                views.append(self._crops.cut(decode(self._job.root / name), name))
            except UnreadableImageError as error:
                skipped.append({"image": name, "reason": str(error)})
                continue
            except UnicodeEncodeError:
                skipped.append({"image": name, "reason": "name is not valid UTF-8"})
                continue
            names.append(name)
            numbers.append(self._block.first + position)
            if self._annotate:
                extra.append(self._annotate(name))
        size = self._crops.size
        pixels = np.concatenate(views) if views else np.empty((0, size, size, 3), np.uint8)
        return _Piece(names, numbers, torch.from_numpy(pixels), extra, skipped)


@dataclass(frozen=True)
class Loading:
    """How images become batches."""

    crops: Crops
    batch: int
    """Views in a batch (rounded down to whole images, at least one)."""
    workers: int
    """Decoding processes; 0: decode in this one."""

    def batches(self, job: Job, blocks: Sequence[int], annotate: Callable[[str], np.ndarray] | None) -> Iterator[Batch]:
        """Batches of the given blocks in order. A block's batches depend on nothing but the block."""
        step = max(1, self.batch // self.crops.views)
        plan, pieces = [], []
        for block in blocks:
            images = min(job.block_images, job.images - block * job.block_images)
            for first in range(0, images, step):
                end = min(first + step, images)
                starts = range(first, end, PIECE)
                plan.append((block, end == images, len(starts)))
                pieces.extend((block, start, min(PIECE, end - start)) for start in starts)
        loader = iter(
            DataLoader(
                _Pieces(job, self.crops, pieces, annotate),
                batch_size=None,
                num_workers=min(self.workers, len(pieces)),
                worker_init_fn=_one_thread,
            )
        )
        for block, last, count in plan:
            parts = [next(loader) for _ in range(count)]
            yield Batch(
                block,
                last,
                [name for part in parts for name in part.names],
                [number for part in parts for number in part.numbers],
                torch.cat([part.pixels for part in parts]),
                [extra for part in parts for extra in part.extra],
                [entry for part in parts for entry in part.skipped],
            )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
