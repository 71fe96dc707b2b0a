"""Operands and error bounds of the exact assignment (``exact.py`` has the algorithm): what its stages share.

Legend: ``n`` points, ``D`` width, ``Dp`` width padded to whole steps, ``K`` codes (padded to whole blocks of tiles),
``T`` tiles.
"""

import math
from dataclasses import dataclass

import torch

GROUP = 64  # codes of a tile
STEP = 64  # columns of a matrix product's step; widths are padded to whole steps
_BLOCK = 256  # codes are padded to whole blocks
NOTHING = -1e30  # score of a code that does not exist

# Norms are scaled to at most 2^7.5, so that no product or sum of fp16 numbers leaves fp16's range.
_LARGEST_NORM = 2**7.5
# A norm computed in fp32 is at most this much too small.
_NORM_UP = 1.0001
# A tensor core adds 16 products to its sum with an error of at most 2^-21 of the largest of them: all are cut off
# at a common exponent (measured on several generations: 2 or 3 bits below fp32's last).
_TENSOR_CORE = 2.0**-21
_FP16_ROUNDING = 2.0**-11
_FP32_ROUNDING = 2.0**-24

ROWS_AT_ONCE = 1 << 18


@dataclass
class PreparedPoints:
    """Points x (scaled by ``factor``) and their fp16 roundings x_h."""

    exact: torch.Tensor  # fp32 [n, D], not scaled
    halves: torch.Tensor  # fp16 [n, Dp]
    factor: float
    residuals: torch.Tensor  # |x - x_h|, fp32 [n], rounded up
    lengths: torch.Tensor  # the larger of |x_h| and |x|, fp32 [n], rounded up


@dataclass
class PreparedCentroids:
    """Centroids c (scaled by ``factor``) in the order of their tiles, and their split into fp16 halves."""

    exact: torch.Tensor  # fp64 [K, D] in the codes' own order, not scaled, without padding
    order: torch.Tensor  # code of each place, int32 [K]
    high: torch.Tensor  # fp16 [K, Dp]
    low: torch.Tensor  # fp16 [K, Dp]
    half_squares: torch.Tensor  # -|c|^2 / 2 in units of `factor`^2, fp64 [K]; ``NOTHING`` for padding
    factor: float
    radius: torch.Tensor  # largest |c| of each tile, fp32 [T]
    residual: torch.Tensor  # largest |c - c_h| of each tile, fp32 [T]


def power_of_two(norm: float) -> float:
    """The power of two that brings ``norm`` just under the largest allowed."""
    return 2.0 ** math.floor(math.log2(_LARGEST_NORM / norm)) if norm > 0 else 1.0


def prepare_points(points: torch.Tensor) -> PreparedPoints:
    """Round centred fp32 points [n, D] to fp16 and measure the rounding of each."""
    n, width = points.shape
    padded = -(-width // STEP) * STEP
    halves = torch.zeros(n, padded, dtype=torch.float16, device=points.device)
    residuals = torch.empty(n, device=points.device)
    lengths = torch.empty(n, device=points.device)
    norms = torch.cat([part.norm(dim=1) for part in points.split(ROWS_AT_ONCE)])
    factor = power_of_two(float(norms.max()))
    for start in range(0, n, ROWS_AT_ONCE):
        own = slice(start, start + ROWS_AT_ONCE)
        scaled = points[own] * factor
        halves[own, :width] = scaled
        rounded = halves[own, :width].float()
        residuals[own] = (scaled - rounded).norm(dim=1) * _NORM_UP
        lengths[own] = torch.maximum(rounded.norm(dim=1), norms[own] * factor) * _NORM_UP
    return PreparedPoints(points, halves, factor, residuals, lengths)


def prepare_centroids(centroids: torch.Tensor) -> PreparedCentroids:
    """Order centred fp32 centroids [K, D] into tiles of neighbours and split them into fp16 halves."""
    count, width = centroids.shape
    device = centroids.device
    codes = -(-count // _BLOCK) * _BLOCK
    padded = -(-width // STEP) * STEP
    norms = centroids.norm(dim=1)
    factor = power_of_two(float(norms.max()))
    places = _neighbours(centroids)
    scaled = torch.zeros(codes, padded, device=device)
    scaled[:count, :width] = centroids[places] * factor
    high = scaled.half()
    rest = scaled - high.float()
    half_squares = torch.full((codes,), NOTHING, dtype=torch.float64, device=device)
    half_squares[:count] = scaled[:count].double().square().sum(1) / -2
    order = torch.zeros(codes, dtype=torch.int32, device=device)
    order[:count] = places
    return PreparedCentroids(
        exact=centroids.double(),
        order=order,
        high=high,
        low=rest.half(),
        half_squares=half_squares,
        factor=factor,
        radius=torch.maximum(scaled.norm(dim=1), high.float().norm(dim=1)).view(-1, GROUP).amax(1) * _NORM_UP,
        residual=rest.norm(dim=1).view(-1, GROUP).amax(1) * _NORM_UP,
    )


def _neighbours(centroids: torch.Tensor, every: int = 16) -> torch.Tensor:
    """An order in which near centroids are near: that of the nearest of every 16th, which are ordered so in turn."""
    pivots = centroids[::every]
    if len(pivots) < 2:
        return torch.arange(len(centroids), device=centroids.device)
    pivots = pivots[_neighbours(pivots, every=4)]
    scores = centroids @ pivots.t() - pivots.square().sum(1) / 2
    return scores.argmax(1).sort(stable=True).indices


@dataclass
class Bounds:
    """A score's error in tile t: residuals * radius[t] + lengths * slack[t] + constant[t] + relative * |score|."""

    radius: torch.Tensor
    slack: torch.Tensor
    constant: torch.Tensor
    relative: float
    # after the recheck: lengths * recheck_slack + recheck_constant, in any tile
    recheck_slack: float
    recheck_constant: float


def bounds(points_factor: float, centroids: PreparedCentroids, padded: int, fp16_products: bool) -> Bounds:
    """The error bounds of both passes; ``fp16_products``: the first pass rounds its products to fp16."""
    squares = torch.where(centroids.half_squares == NOTHING, 0.0, centroids.half_squares.abs())
    squares = (squares * (points_factor / centroids.factor)).view(-1, GROUP).amax(1).float()
    steps = padded // 16
    relative = _FP16_ROUNDING * 1.001 if fp16_products else 0.0
    largest = float(centroids.radius.max())
    # Sums of 64 products on tensor cores, then fp32 additions of whose partial sums none exceeds |x| |c|; the product
    # of the low halves, and what the halves leave out, is left out.
    recheck = (STEP // 16 + 1) * _TENSOR_CORE + (padded // STEP + 2) * _FP32_ROUNDING + 3 * 2.0**-22
    return Bounds(
        radius=centroids.radius,
        slack=centroids.residual + (steps * _TENSOR_CORE + 4 * _FP32_ROUNDING) * centroids.radius,
        # fp16 cannot hold products below 2^-14 exactly, hence the last term.
        constant=4 * _FP32_ROUNDING * squares + relative * squares + (2.0**-24 if fp16_products else 0.0),
        relative=relative,
        recheck_slack=recheck * largest + 2.0**-24 * math.sqrt(padded),
        recheck_constant=4 * _FP32_ROUNDING * float(squares.max()) + 2.0**-24 * math.sqrt(padded) * largest,
    )
