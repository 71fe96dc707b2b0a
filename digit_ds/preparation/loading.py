"""Decoding in worker processes, ahead of the device: batches of views, block by block."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from digit_ds.data.images import STRETCHED, Crops, UnreadableImageError, decode
from digit_ds.errors import UserError
from digit_ds.parallel.workers import ignore_stop_signals
from digit_ds.preparation.jobs import Block, Job
from digit_ds.preparation.settings import JpegDecoder
from digit_ds.preparation.slab import Place, Slab

PIECE = 16
"""Images that a worker handles at a time: small, so that the workers share the load evenly."""
HELD = 3
"""Batches whose data are in use at a time: one is staged, one lies ready, one is being collected."""
FILE_BYTES = 1 << 18
"""Room in shared memory for one file that the GPU is to decode; a photograph of 500 x 375 pixels has half of it."""
LONGEST_FOR_GPU = 2048
"""Images with a longer side are decoded by the workers."""


@dataclass
class Piece:
    """Consecutive images of one block, and what became of them so far."""

    names: list[str] = field(default_factory=list)
    """Names of the readable images."""
    numbers: list[int] = field(default_factory=list)
    """Their 0-based numbers in the sorted list."""
    data: list[Tensor] = field(default_factory=list)
    """Of each image: its views, uint8 [views, size, size, 3], or the file that the GPU is to decode, uint8 [bytes]."""
    windows: list[np.ndarray | None] = field(default_factory=list)
    """Of each image that the GPU is to decode: ``Crops.windows``; else None."""
    extra: list[np.ndarray] = field(default_factory=list)
    """Of each image: what ``annotate`` gave."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """``{"image", "reason"}`` of the unreadable ones."""


@dataclass
class Batch(Piece):
    """Consecutive images of one block that the device takes at a time."""

    block: int = 0
    last: bool = False
    """Whether this is the block's last batch."""


class _Pieces(Dataset):
    """Item i = piece i: (block, first image inside it, images)."""

    def __init__(
        self,
        job: Job,
        loading: "Loading",
        pieces: list[tuple[int, int, int]],
        annotate: Callable | None,
        slab: Slab,
    ) -> None:
        self._job, self._loading, self._pieces, self._annotate, self._slab = job, loading, pieces, annotate, slab
        self._block: Block | None = None

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, item: int) -> tuple[Piece, list[Place]]:
        """The piece without its data, and where they lie in the item's slot."""
        piece = self._load(item)
        places = self._slab.put(item, piece.data)
        piece.data = []
        return piece, places

    def _load(self, item: int) -> Piece:
        number, first, count = self._pieces[item]
        if self._block is None or self._block.number != number:
            self._block = self._job.read_block(number)
        piece = Piece()
        for position in range(first, first + count):
            name = self._block.names[position]
            try:
                self._add_image(piece, name)
            except UnreadableImageError as error:
                piece.skipped.append({"image": name, "reason": str(error)})
                continue
            piece.names.append(name)
            piece.numbers.append(self._block.first + position)
            if self._annotate:
                piece.extra.append(self._annotate(name))
        return piece

    def _add_image(self, piece: Piece, name: str) -> None:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnreadableImageError("name is not valid UTF-8") from error
        content, crops = self._job.source.read(name), self._loading.crops
        jpeg = _for_gpu(content) if self._loading.decoder == "gpu" else None
        if jpeg:
            piece.data.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            piece.windows.append(crops.windows(jpeg, name))
        else:
            piece.data.append(torch.from_numpy(crops.cut(decode(content), name)))
            piece.windows.append(None)


def _for_gpu(data: bytes) -> tuple[int, int] | None:
    """Size of a plain, upright, whole RGB JPEG file; None for all that the GPU might take otherwise."""
    try:
        image = Image.open(BytesIO(data), formats=["JPEG"])
        plain = image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
        upright = "exif" not in image.info or image.getexif().get(0x0112, 1) == 1
    except Exception:  # the CPU decoder will report what is wrong with it
        return None
    short, long = sorted(image.size)
    whole = b"\xff\xd9" in data[-64:]  # the end marker
    if plain and upright and whole and long <= LONGEST_FOR_GPU and long < STRETCHED * short:
        return image.size
    return None


@dataclass(frozen=True)
class Loading:
    """How images become batches."""

    crops: Crops
    batch: int
    """Views in a batch (rounded down to whole images, at least one)."""
    workers: int
    """Decoding processes; 0: decode in this one."""
    decoder: JpegDecoder = "cpu"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"batch is {self.batch}, expected at least 1")
        if self.decoder not in get_args(JpegDecoder):
            raise UserError(f"decoder is {self.decoder!r}, expected one of {', '.join(get_args(JpegDecoder))}")
        if self.decoder == "gpu" and not torch.cuda.is_available():
            raise UserError("decoder is 'gpu', but this machine has no CUDA device, expected 'cpu'")

    @property
    def images_per_batch(self) -> int:
        """Images in a full batch."""
        return max(1, self.batch // self.crops.views)

    def batches(
        self, job: Job, blocks: Sequence[int], annotate: Callable[[str], np.ndarray] | None = None
    ) -> Iterator[Batch]:
        """Start the workers; batches of the given blocks in order. A block's batches depend on the block alone.

        The data of a batch are overwritten once ``HELD`` more have been asked for.
        """
        plan: list[tuple[int, bool, int]] = []
        pieces: list[tuple[int, int, int]] = []
        for block in blocks:
            images = min(job.block_images, job.images - block * job.block_images)
            for first in range(0, images, self.images_per_batch):
                end = min(first + self.images_per_batch, images)
                starts = range(first, end, PIECE)
                plan.append((block, end == images, len(starts)))
                pieces.extend((block, start, min(PIECE, end - start)) for start in starts)
        if not pieces:
            return iter(())
        workers = min(self.workers, len(pieces))
        # Enough for a batch and a half to lie ready.
        ahead = max(2, -(-2 * self.images_per_batch // (PIECE * workers))) if workers else 0
        # Neither the batches that are held nor the pieces ahead of them must be overwritten.
        slab = Slab(workers * ahead + HELD * max(parts for _, _, parts in plan), self._piece_bytes)
        loader = DataLoader(
            _Pieces(job, self, pieces, annotate, slab),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=ignore_stop_signals,
            prefetch_factor=ahead or None,
            multiprocessing_context="fork" if workers else None,  # the slab's memory is inherited
        )
        return _gather(iter(loader), plan, slab)

    @property
    def _piece_bytes(self) -> int:
        """Room for the data of a piece: what does not fit takes a slower way."""
        views = self.crops.views * self.crops.size**2 * 3
        return PIECE * (max(views, FILE_BYTES) if self.decoder == "gpu" else views)


def _gather(
    pieces: Iterator[tuple[Piece, list[Place]]], plan: list[tuple[int, bool, int]], slab: Slab
) -> Iterator[Batch]:
    """Put pieces together to batches; ``plan`` holds (block, last, pieces) of each.

    A batch's data are to be used before the ``HELD``-th one after it is asked for.
    """
    numbers = count()
    for block, last, parts in plan:
        batch = Batch(block=block, last=last)
        for _ in range(parts):
            piece, places = next(pieces)
            piece.data = slab.get(next(numbers), places)
            for name, values in vars(piece).items():
                getattr(batch, name).extend(values)
        yield batch


def _as_it_is(item: object) -> object:
    return item
