"""Other ways of scheduling the exact assignment's kernels, for ``kmeans_speed.py``; all give the same codes.

``DEFAULT`` is the one that the project uses (``digit_ds/clustering/kernels.py``).
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from digit_ds.clustering.bounds import GROUP, STEP
from digit_ds.clustering.exact import ExactAssigner
from digit_ds.clustering.gpu_stages import GpuStages
from digit_ds.clustering.kernels import Maxima, Recheck, maxima_of_tiles, tile_maxima


@triton.jit
def pointer_maxima_kernel(
    points, centroids, bias, maxima, n, tiles,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Largest score of each tile of codes, fp32 [n, T], of fp16 points [n, Dp] and centroids [K, Dp]."""
    columns_of_blocks = tiles // (CODES // GROUP)
    block = tl.program_id(0)
    first_row = (block // columns_of_blocks) * ROWS
    first_code = (block % columns_of_blocks) * CODES
    rows = first_row + tl.arange(0, ROWS)
    codes = first_code + tl.arange(0, CODES)
    step = tl.arange(0, STEP)
    left = points + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * WIDTH + step[None, :]
    right = centroids + codes[None, :] * WIDTH + step[:, None]
    products = tl.zeros((ROWS, CODES), tl.float32)
    for _ in range(0, WIDTH, STEP):
        products = tl.dot(tl.load(left), tl.load(right), products)
        left += STEP
        right += STEP
    best = maxima_of_tiles(products + tl.load(bias + codes)[None, :], ROWS, CODES, GROUP)
    out = first_code // GROUP + tl.arange(0, CODES // GROUP)
    tl.store(maxima + rows.to(tl.int64)[:, None] * tiles + out[None, :], best, mask=rows[:, None] < n)


@triton.jit
def group_maxima_kernel(products, bias, maxima, n, tiles, ROWS: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr):
    """Largest score of each tile from products fp16 [n, K] that the library computed."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    codes = tl.program_id(1) * CODES + tl.arange(0, CODES)
    there = rows[:, None] < n
    scores = tl.load(products + rows[:, None] * (tiles * GROUP) + codes[None, :], mask=there, other=0.0).to(tl.float32)
    best = maxima_of_tiles(scores + tl.load(bias + codes)[None, :], ROWS, CODES, GROUP)
    out = tl.program_id(1) * (CODES // GROUP) + tl.arange(0, CODES // GROUP)
    tl.store(maxima + rows[:, None] * tiles + out[None, :], best, mask=there)


def pointer_maxima(
    halves: torch.Tensor, centroids: torch.Tensor, bias: torch.Tensor, maxima: torch.Tensor, schedule: Maxima
) -> None:
    """``tile_maxima`` without tensor descriptors (TMA)."""
    n, tiles = maxima.shape
    blocks = triton.cdiv(n, schedule.rows) * (centroids.shape[0] // schedule.codes)
    pointer_maxima_kernel[(blocks,)](
        halves, centroids, bias, maxima, n, tiles, WIDTH=halves.shape[1], ROWS=schedule.rows, CODES=schedule.codes,
        STEP=STEP, GROUP=GROUP, num_warps=schedule.warps, num_stages=schedule.stages,
    )  # fmt: skip


def library_maxima(halves: torch.Tensor, centroids: torch.Tensor, bias: torch.Tensor, maxima: torch.Tensor) -> None:
    """``tile_maxima`` by the library's matrix product, which rounds scores to fp16, and a pass for maxima."""
    rows = 32768  # 512 MiB of fp16 products for 8,192 codes
    tiles = maxima.shape[1]
    for start in range(0, len(halves), rows):
        products = halves[start : start + rows] @ centroids.t()  # fp16 [rows, K]
        group_maxima_kernel[(triton.cdiv(len(products), 32), centroids.shape[0] // 256)](
            products, bias, maxima[start:], len(products), tiles, ROWS=32, CODES=256, GROUP=GROUP, num_warps=4
        )


DEFAULT = "tma-persistent-128x256"
VARIANTS: dict[str, Callable[..., None]] = {
    DEFAULT: tile_maxima,
    "tma-persistent-128x256-4": partial(tile_maxima, schedule=Maxima(stages=4)),
    "tma-128x256": partial(tile_maxima, schedule=Maxima(stages=4, persistent=False)),
    "tma-128x128": partial(tile_maxima, schedule=Maxima(codes=128, warps=4, persistent=False)),
    "tma-persistent-128x128": partial(tile_maxima, schedule=Maxima(codes=128, stages=4)),
    "tma-256x128": partial(tile_maxima, schedule=Maxima(rows=256, codes=128, stages=4, persistent=False)),
    "pointers-128x256": partial(pointer_maxima, schedule=Maxima()),
    "pointers-128x128": partial(pointer_maxima, schedule=Maxima(codes=128, warps=4)),
    "library": library_maxima,
}
RECHECKS = {
    "64": Recheck(),
    "64-2": Recheck(stages=2),
    "128-8": Recheck(rows=128, warps=8, stages=2),
    "128-4": Recheck(rows=128, warps=4, stages=2),
}


def make_variant(device: torch.device, maxima: str = DEFAULT, recheck: str = "64") -> ExactAssigner:
    """The exact assigner with other kernels; on a CPU they need Triton's interpreter."""
    return ExactAssigner(device, GpuStages(VARIANTS[maxima], RECHECKS[recheck], fp16_products=maxima == "library"))
