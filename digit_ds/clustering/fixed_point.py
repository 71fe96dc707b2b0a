"""Sums of points that do not depend on the order of addition: 64-bit fixed point.

Floating-point sums change with the order of their terms, so with the number of processes and with the timing of GPU
threads. Whole numbers do not. Coordinates become whole multiples of a power of two so fine that the sum of all points
just fits 62 bits, which keeps more bits of a sum than fp64's 53; 1 or 64 processes get the same centroids, bit for bit.
"""

import math
from importlib.util import find_spec

import torch


def scale_for(count: int, magnitude: float) -> float:
    """The largest power of two ``s`` with ``count * magnitude * s < 2^62``; no coordinate exceeds ``magnitude``."""
    exponent = 62 - math.frexp(float(count))[1] - math.frexp(max(magnitude, 2.0**-60))[1]
    return 2.0 ** min(exponent, 100)


def add_points(
    sums: torch.Tensor, counts: torch.Tensor, points: torch.Tensor, codes: torch.Tensor, scale: float
) -> None:
    """Add float32 ``points`` [n, D] to the rows of ``sums`` int64 [K, D] that ``codes`` name, and count them.

    The product with a power of two is exact and the conversion cuts off what is below one unit.
    """
    if sums.is_cuda and find_spec("triton"):
        from digit_ds.clustering.kernels import add_points_sorted

        add_points_sorted(sums, counts, points, codes, scale)
        return
    sums.index_add_(0, codes, (points * scale).to(torch.int64))
    counts += torch.bincount(codes, minlength=len(counts))
