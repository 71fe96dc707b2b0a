"""The exact assignment's algorithm in plain torch: bounds hold, near-ties come out as in fp64."""

import pytest
import torch

from digit_ds.clustering.bounds import GROUP, STEP, bounds, prepare_centroids, prepare_points
from digit_ds.clustering.exact import ExactAssigner, nearest_in_fp64
from digit_ds.clustering.shard import PointBatch

CPU = torch.device("cpu")


def gaussian(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def near_ties(width=48):
    """Points in the middle between two centroids, moved by a few fp32 roundings to either side."""
    centroids = gaussian(300, width, 1)
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randint(300, (2, 2000), generator=generator)
    share = 0.5 + (torch.rand(2000, 1, generator=generator) - 0.5) * 10 ** torch.linspace(-1, -8, 2000).unsqueeze(1)
    points = share * centroids[left] + (1 - share) * centroids[right]
    return points, centroids


def duplicates(width=32):
    centroids = gaussian(130, width, 3)
    centroids[70:] = centroids[:60]
    return gaussian(500, width, 4), centroids


def far_apart(width=40):
    scale = 10 ** torch.linspace(-3, 3, 600).unsqueeze(1)
    return gaussian(600, width, 5) * scale, gaussian(200, width, 6) * scale[::3]


CASES = {
    "gaussian": lambda: (gaussian(1500, 100), gaussian(700, 100, 9) * 0.3),
    "near ties": near_ties,
    "duplicates": duplicates,
    "far apart": far_apart,
    "all equal": lambda: (torch.zeros(50, 8), torch.zeros(70, 8)),
    "one code": lambda: (gaussian(20, 8), gaussian(1, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_assignment_is_that_of_fp64(case):
    points, centroids = CASES[case]()
    assigner = ExactAssigner(CPU)
    assigner.set_centroids(centroids)
    codes = assigner.assign(PointBatch(0, points))
    torch.testing.assert_close(codes, nearest_in_fp64(points, centroids.double()))


def test_the_recheck_is_needed_and_small():
    points, centroids = gaussian(6000, 100), gaussian(700, 100, 9) * 0.3
    assigner = ExactAssigner(CPU)
    assigner.set_centroids(centroids)
    codes = assigner.assign(PointBatch(0, points))
    rounded = (points.half().float() @ centroids.half().float().t() - centroids.square().sum(1) / 2).argmax(1)
    assert (rounded != codes).any()
    assert len(points) < assigner.rechecked < 3 * len(points)
    assert assigner.doubtful < 0.02 * len(points)


def tensor_core_product(left, right, start=None):
    """left [n, D] @ right [K, D].T as tensor cores sum: 16 products at a time, cut off at 2^-23 of the largest."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64) if start is None else start.double()
    for column in range(0, left.shape[1], 16):
        terms = left[:, None, column : column + 16].double() * right[None, :, column : column + 16].double()
        terms = torch.cat([total.unsqueeze(2), terms], 2)
        unit = 2.0 ** (terms.abs().amax(2, keepdim=True).clamp(min=1e-30).log2().floor() - 23)
        total = ((terms / unit).trunc() * unit).sum(2).float().double()
    return total


@pytest.mark.parametrize("case", ["gaussian", "near ties", "far apart"])
def test_bounds_hold_for_a_tensor_core_that_cuts_off(case):
    points, centroids = (part[:60] for part in CASES[case]())
    x, c = prepare_points(points), prepare_centroids(centroids)
    limits = bounds(x.factor, c, x.halves.shape[1], False)
    exact_scores = (points.double() @ centroids.double().t() - centroids.double().square().sum(1) / 2)[
        :, c.order[: len(centroids)].long()
    ]
    exact_scores = exact_scores * x.factor * c.factor
    bias = (c.half_squares * (x.factor / c.factor)).float().double()[: len(centroids)]
    first = (tensor_core_product(x.halves, c.high[: len(centroids)]) + bias).float()
    error = torch.outer(x.residuals, limits.radius) + torch.outer(x.lengths, limits.slack) + limits.constant
    error = error.repeat_interleave(GROUP, 1)[:, : len(centroids)]
    assert ((first - exact_scores).abs() <= error).all()
    scaled = torch.nn.functional.pad(points * x.factor, (0, x.halves.shape[1] - points.shape[1]))
    low = (scaled - x.halves.float()).half()
    total = torch.zeros_like(first)
    for step in range(0, scaled.shape[1], STEP):
        columns = slice(step, step + STEP)
        high_c, low_c = c.high[: len(centroids), columns], c.low[: len(centroids), columns]
        part = tensor_core_product(low[:, columns], high_c)
        part = tensor_core_product(x.halves[:, columns], low_c, part)
        part = tensor_core_product(x.halves[:, columns], high_c, part)
        total = total + part.float()
    second = (total + bias).float()
    error = x.lengths * limits.recheck_slack + limits.recheck_constant
    assert ((second - exact_scores).abs() <= error.unsqueeze(1)).all()
    assert limits.recheck_slack < 0.1 * (limits.slack.max() + x.residuals.max())


def test_tiles_hold_neighbours():
    """Centroids of separate clouds, shuffled, come to lie in few tiles of their own."""
    generator = torch.Generator().manual_seed(0)
    cloud = torch.arange(512) % 8
    centroids = gaussian(512, 16, 1) * 0.1 + (gaussian(8, 16, 2) * 5)[cloud]
    places = torch.randperm(512, generator=generator)
    order = prepare_centroids(centroids[places]).order.long()
    clouds_per_tile = [len(tile.unique()) for tile in cloud[places][order].view(-1, GROUP)]
    assert sum(clouds_per_tile) <= 32  # in any other order nearly all 8 clouds are in each of the 8 tiles
    assert sorted(order.tolist()) == list(range(512))
