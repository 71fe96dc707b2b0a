"""Groups of blocks of images: the units of a model call. Equal groups give equal pictures in any precision."""

from collections.abc import Iterator, Sequence

import torch

from digit_ds.generation.pipeline import BLOCK, Codes, Pipeline
from digit_ds.generation.sources import Source


def block_images(block: int, count: int) -> range:
    """Image numbers of a block of a job of ``count`` images."""
    return range(block * BLOCK, min((block + 1) * BLOCK, count))


def grouped(blocks: Sequence[int], rows: int, processes: int) -> Iterator[Sequence[int]]:
    """Groups of blocks. A group fills the ``rows`` of a model call, unless that would leave processes idle."""
    size = max(1, min(rows // BLOCK, -(-len(blocks) // processes)))
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]


def write_codes(
    pipeline: Pipeline, images: Sequence[int], labels: Sequence[int], source: Source | None, keep: int | None
) -> Codes:
    """Write the tokens of ``images``.

    Args:
        images: global image numbers.
        labels: of all images of the job; read by a class-conditional prior only.
        source: gives first-stage codes; None: the prior writes all.
        keep: how many leading codes of the source are kept; None: all.
    """
    numbers = torch.tensor(images)
    conditional = pipeline.prior is not None and bool(pipeline.prior.spec.classes)
    known = None
    if source is not None:
        known = source.codes(numbers)
        if keep is not None:
            known[:, keep:] = -1
    return pipeline.write(numbers, torch.tensor(labels)[numbers] if conditional else None, known)
