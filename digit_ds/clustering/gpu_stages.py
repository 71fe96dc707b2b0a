"""The stages of exact.py on a GPU: buffers, launches and, for the benchmark, the time of each stage."""

from collections.abc import Callable

import torch
import triton

from digit_ds.clustering import kernels
from digit_ds.clustering.bounds import GROUP, ROWS_AT_ONCE, STEP, Bounds, PreparedCentroids, PreparedPoints


class GpuStages:
    """See ``TorchStages``. ``timer``, if set, is called with each stage's name when it has been launched."""

    def __init__(
        self,
        tile_maxima: Callable[..., None] = kernels.tile_maxima,
        recheck: kernels.Recheck = kernels.RECHECK,
        fp16_products: bool = False,
    ) -> None:
        self.tile_maxima, self.recheck, self.fp16_products = tile_maxima, recheck, fp16_products
        self.timer: Callable[[str], None] = lambda stage: None

    def __call__(
        self,
        points: PreparedPoints,
        centroids: PreparedCentroids,
        bias: torch.Tensor,
        limits: Bounds,
        codes: torch.Tensor,
        doubts: torch.Tensor,
    ) -> torch.Tensor:
        """See ``TorchStages``; the number of pairs stays on the GPU."""
        tiles = len(bias) // GROUP
        n = min(ROWS_AT_ONCE, len(codes))
        device = codes.device
        maxima = torch.empty(n, tiles, device=device)
        lists = torch.empty(tiles, n, dtype=torch.int32, device=device)
        pair_keys = torch.empty(tiles, n, dtype=torch.int64, device=device)
        pair_seconds = torch.empty(tiles, n, device=device)
        keys = torch.empty(n, dtype=torch.int64, device=device)
        recheck = self.recheck
        pairs = torch.zeros((), dtype=torch.int64, device=device)
        for start in range(0, len(codes), n):
            own = slice(start, start + n)
            count = len(codes[own])
            self.timer("prepare")
            self.tile_maxima(points.halves[own], centroids.high, bias, maxima[:count])
            self.timer("maxima")
            counts = torch.zeros(tiles, dtype=torch.int32, device=device)
            padded_tiles = triton.next_power_of_2(tiles)
            rows = max(1, 8192 // padded_tiles)
            kernels.select_kernel[(triton.cdiv(count, rows),)](
                maxima, points.residuals[own], points.lengths[own], limits.radius, limits.slack, limits.constant,
                limits.relative, lists, counts, count, n, tiles, TILES=padded_tiles, ROWS=rows, num_warps=8,
            )  # fmt: skip
            pairs += counts.sum()
            self.timer("select")
            keys.fill_(torch.iinfo(torch.int64).min)
            kernels.recheck_kernel[(tiles, recheck.programs)](
                points.exact[own], centroids.high, centroids.low, bias, centroids.order, lists, counts, keys, pair_keys,
                pair_seconds, n, points.exact.shape[1], points.factor, WIDTH=points.halves.shape[1],
                ROWS=recheck.rows, STEP=STEP, GROUP=GROUP, PROGRAMS=recheck.programs,
                num_warps=recheck.warps, num_stages=recheck.stages,
            )  # fmt: skip
            self.timer("recheck")
            kernels.doubt_kernel[(tiles, recheck.programs)](
                lists, counts, keys, pair_keys, pair_seconds, points.lengths[own], doubts[own], n,
                limits.recheck_slack, limits.recheck_constant, ROWS=512, PROGRAMS=recheck.programs, num_warps=4,
            )  # fmt: skip
            codes[own] = 0x7FFFFFFF - (keys[:count] & 0xFFFFFFFF)
            self.timer("doubt")
        return pairs
