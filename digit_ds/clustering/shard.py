"""One process's share of the points, streamed batch by batch or kept on its GPU where it fits."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from digit_ds.clustering.points import BLOCK_ROWS, Points

# Blocks that a GPU gets at once: 262,144 points fill it many times over.
_GPU_BLOCKS = 32
# Share of the free GPU memory that kept points may fill (each batch with what the assigner keeps beside it).
_GPU_SHARE = 0.6


@dataclass
class PointBatch:
    """``points`` float32 [n, D], centred, on the assigner's device; ``kept`` is the assigner's to fill once a batch."""

    start: int
    points: torch.Tensor
    kept: dict[str, Any] = field(default_factory=dict)


class Shard:
    """Blocks ``first`` to ``last`` of the points: the ``rank``-th of ``world_size`` equal shares."""

    def __init__(self, points: Points, rank: int, world_size: int, device: torch.device) -> None:
        self.points = points
        self.device = device
        self.first = points.blocks * rank // world_size
        self.last = points.blocks * (rank + 1) // world_size
        self._blocks_at_once = _GPU_BLOCKS if device.type == "cuda" else 1
        self._resident: dict[int, PointBatch] = {}

    @property
    def count(self) -> int:
        """Points in this share."""
        return max(0, min(self.last * BLOCK_ROWS, self.points.count) - self.first * BLOCK_ROWS)

    def raw(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number, float32 rows) of each block; the next one is read while this one is worked on."""
        yield from self._read_ahead([(number, number + 1) for number in range(self.first, self.last)])

    def batches(self, mean: np.ndarray) -> Iterator[PointBatch]:
        """The centred points, batch by batch. Batches that fit the GPU stay there for the next call."""
        centre = torch.from_numpy(mean.astype(np.float32)).to(self.device)
        step = self._blocks_at_once
        spans = [(block, min(block + step, self.last)) for block in range(self.first, self.last, step)]
        reader = self._read_ahead([span for span in spans if span[0] not in self._resident])
        for first, _ in spans:
            if first not in self._resident:
                number, rows = next(reader)
                points = torch.from_numpy(rows).to(self.device).sub_(centre)
                batch = PointBatch(number * BLOCK_ROWS, points)
                if self._fits(points):
                    self._resident[first] = batch
            else:
                batch = self._resident[first]
            yield batch

    def _read_ahead(self, spans: list[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
        def read(span: tuple[int, int]) -> tuple[int, np.ndarray]:
            return span[0], self.points.read(span[0] * BLOCK_ROWS, min(span[1] * BLOCK_ROWS, self.points.count))

        with ThreadPoolExecutor(1) as reader:
            pending = None
            for span in spans:
                upcoming = reader.submit(read, span)
                if pending is not None:
                    yield pending.result()
                pending = upcoming
            if pending is not None:
                yield pending.result()

    def _fits(self, points: torch.Tensor) -> bool:
        if self.device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self.device)
        return free > (1 - _GPU_SHARE) * total + 2 * points.numel() * points.element_size()
