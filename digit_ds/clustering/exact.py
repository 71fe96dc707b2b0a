"""Exact nearest centroids at half-precision speed.

The nearest centroid has the largest score ``x.c - |c|^2 / 2``. Tensor cores compute all scores from fp16 roundings of
points and centroids, and only the largest of each tile of 64 codes is kept. How wrong such a score can be is known:

    |x.c - x_h.c_h| <= |x - x_h| |c| + |x_h| |c - c_h| + (what fp32 accumulation loses),

with the norms of the rounding residues computed, not estimated. The tiles whose maximum lies within these bounds of
the best are computed again for this point with twice the bits, and the few points whose best two scores are then still
closer than the (some hundred times smaller) bound of that are settled in fp64 over all codes. So each result is
fp64's, the lower code where two centroids are equally near.

Points and centroids must be centred (their mean subtracted), and tiles hold neighbouring centroids: both make
bounds small and the tiles to recheck few. Every stage exists twice, as a Triton kernel (kernels.py) and here in plain
torch, which is what runs without a GPU and what the kernels are tested against.

Legend: ``n`` points, ``D`` width, ``K`` codes (padded to whole blocks of tiles), ``T`` tiles.
"""

from typing import Protocol

import torch

from digit_ds.clustering.bounds import (
    GROUP,
    NOTHING,
    STEP,
    Bounds,
    PreparedCentroids,
    PreparedPoints,
    bounds,
    prepare_centroids,
    prepare_points,
)
from digit_ds.clustering.shard import PointBatch

_FP64_SCORES = 1 << 26


class Stages(Protocol):
    """All stages but the last, which fp64 is."""

    fp16_products: bool
    """Whether the first pass rounds its products to fp16."""

    def __call__(
        self,
        points: PreparedPoints,
        centroids: PreparedCentroids,
        bias: torch.Tensor,
        limits: Bounds,
        codes: torch.Tensor,
        doubts: torch.Tensor,
    ) -> torch.Tensor | int:
        """Fill ``codes`` int64 [n] and mark ``doubts`` int32 [n]; returns the pairs (point, tile) rechecked."""


class TorchStages:
    """In plain torch, see ``Stages``."""

    fp16_products = False

    def __call__(
        self,
        points: PreparedPoints,
        centroids: PreparedCentroids,
        bias: torch.Tensor,
        limits: Bounds,
        codes: torch.Tensor,
        doubts: torch.Tensor,
    ) -> int:
        """See ``Stages``."""
        pairs = 0
        rows_at_once = max(1, (1 << 22) // len(bias))
        for start in range(0, len(codes), rows_at_once):
            own = slice(start, start + rows_at_once)
            # [n, K] -> largest of each tile [n, T]; fp16 x fp16 is exact in fp32
            maxima = (
                torch.addmm(bias, points.halves[own].float(), centroids.high.float().t())
                .unflatten(1, (-1, GROUP))
                .amax(2)
            )
            error = (
                torch.outer(points.residuals[own], limits.radius)
                + torch.outer(points.lengths[own], limits.slack)
                + limits.constant
                + limits.relative * maxima.abs()
            )
            flagged = maxima + error >= (maxima - error).amax(1, keepdim=True)  # [n, T]
            pairs += int(flagged.sum())
            exact = torch.nn.functional.pad(
                points.exact[own] * points.factor, (0, points.halves.shape[1] - points.exact.shape[1])
            )
            scores = torch.zeros(len(exact), len(bias))
            for step in range(0, exact.shape[1], STEP):
                columns = slice(step, step + STEP)
                high = points.halves[own, columns].float()
                low = (exact[:, columns] - high).half().float()
                right_high, right_low = centroids.high[:, columns].float().t(), centroids.low[:, columns].float().t()
                scores += low @ right_high + high @ right_low + high @ right_high
            scores = torch.where(flagged.repeat_interleave(GROUP, 1), scores + bias, NOTHING)
            best, places = scores.topk(2, 1)
            codes[own] = centroids.order[places[:, 0]].long()
            error = points.lengths[own] * limits.recheck_slack + limits.recheck_constant
            doubts[own] = (best[:, 1] + 2 * error >= best[:, 0]).int()
        return pairs


class ExactAssigner:
    """Exact assignment; Triton kernels on CUDA, the same stages in plain torch elsewhere. See ``Assigner``."""

    name = "triton"

    def __init__(self, device: torch.device, stages: Stages | None = None) -> None:
        self.device = device
        self.rechecked: torch.Tensor | int = 0
        """Pairs (point, tile) of the last ``assign``."""
        self.doubtful = 0
        """Points of the last ``assign`` that fp64 settled."""
        if stages is None and device.type == "cuda":
            from digit_ds.clustering.gpu_stages import GpuStages  # needs Triton

            stages = GpuStages()
        self._stages: Stages = stages or TorchStages()

    def set_centroids(self, centroids: torch.Tensor) -> None:
        """See ``Assigner``."""
        self.centroids = prepare_centroids(centroids.to(self.device))

    def assign(self, batch: PointBatch) -> torch.Tensor:
        """See ``Assigner``."""
        if "exact" not in batch.kept:
            batch.kept["exact"] = prepare_points(batch.points)
        points: PreparedPoints = batch.kept["exact"]
        limits = bounds(points.factor, self.centroids, points.halves.shape[1], self._stages.fp16_products)
        # |c|^2 / 2 in the units of the scores: (points' factor) x (centroids' factor)
        squares = self.centroids.half_squares
        bias = torch.where(squares == NOTHING, NOTHING, squares * (points.factor / self.centroids.factor)).float()
        codes = torch.empty(len(points.exact), dtype=torch.int64, device=self.device)
        doubts = torch.zeros(len(points.exact), dtype=torch.int32, device=self.device)
        self.rechecked = self._stages(points, self.centroids, bias, limits, codes, doubts)
        doubtful = doubts.nonzero()[:, 0]
        self.doubtful = len(doubtful)
        for rows in doubtful.split(max(1, _FP64_SCORES // len(self.centroids.exact))):
            codes[rows] = nearest_in_fp64(points.exact[rows], self.centroids.exact)
        return codes


def nearest_in_fp64(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Nearest centroid in fp64 of points [n, D] among fp64 centroids [K, D]; the lowest index where equally near."""
    return torch.addmm(centroids.square().sum(1), points.double(), centroids.t(), beta=-0.5).argmax(1)
