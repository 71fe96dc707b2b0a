"""The Triton kernels in Triton's interpreter, which needs no GPU: they compute what plain torch computes."""

from triton_interpreter import interpret

SCRIPT = """
import types
import torch
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=3)
from digit_ds.clustering import kernels
from digit_ds.clustering.exact import ExactAssigner, nearest_in_fp64
from digit_ds.clustering.fixed_point import scale_for
from digit_ds.clustering.shard import PointBatch
from kmeans_variants import make_variant

random = torch.Generator().manual_seed(0)
points, centroids = torch.randn(333, 70, generator=random), torch.randn(300, 70, generator=random)
copies = centroids.clone()
copies[150:] = copies[:150]
midway = (centroids[:150] + centroids[150:]) / 2
cases = [(points, centroids, name) for name in ("pointers-128x256", "tma-persistent-128x256", "tma-128x128", "library")]
cases += [(points, copies, "pointers-128x128"), (midway, centroids, "pointers-128x128")]
for x, c, variant in cases:
    plain = ExactAssigner(torch.device("cpu"))
    kernel = make_variant(torch.device("cpu"), variant)
    plain.set_centroids(c)
    kernel.set_centroids(c)
    assert torch.equal(kernel.assign(PointBatch(0, x)), nearest_in_fp64(x, c.double())), variant
    plain.assign(PointBatch(0, x))
    assert kernel.doubtful == plain.doubtful, variant
    assert variant == "library" or int(kernel.rechecked) == plain.rechecked, variant

codes = torch.randint(7, (333,), generator=random)
codes[:100] = 3
scale = scale_for(333, float(points.abs().max()))
sums, counts = torch.zeros(9, 70, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
kernels.add_points_sorted(sums, counts, points, codes, scale)
assert torch.equal(sums, torch.zeros_like(sums).index_add_(0, codes, (points * scale).long()))
assert torch.equal(counts, codes.bincount(minlength=9))
print("equal")
"""


def test_kernels_in_the_interpreter():
    interpret(SCRIPT)
