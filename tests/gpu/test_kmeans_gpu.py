"""The exact assignment's kernels and the update's against fp64 and plain torch, on a CUDA device."""

import pytest
import torch

from digit_ds.clustering.shard import PointBatch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kmeans_variants import RECHECKS, VARIANTS, make_variant

from digit_ds.clustering import kernels
from digit_ds.clustering.assignment import FaissAssigner, TorchAssigner
from digit_ds.clustering.exact import ExactAssigner, nearest_in_fp64
from digit_ds.clustering.fixed_point import scale_for

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def gaussian(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA)


def near_ties(width=96):
    centroids = gaussian(1000, width, 1)
    left, right = torch.randint(1000, (2, 20_000), generator=torch.Generator(CUDA).manual_seed(2), device=CUDA)
    moved = 10 ** torch.linspace(-1, -8, 20_000, device=CUDA).unsqueeze(1) * gaussian(20_000, 1, 3)
    return (0.5 + moved) * centroids[left] + (0.5 - moved) * centroids[right], centroids


def duplicates():
    centroids = gaussian(300, 64, 3)
    centroids[150:] = centroids[:150]
    return gaussian(5000, 64, 4), centroids


CASES = {
    "gaussian": lambda: (gaussian(70_001, 768), gaussian(8192, 768, 9) * 0.1),
    "odd sizes": lambda: (gaussian(3333, 50), gaussian(777, 50, 9)),
    "near ties": near_ties,
    "duplicates": duplicates,
    "far apart": lambda: (
        gaussian(9000, 64) * 10 ** torch.linspace(-3, 3, 9000, device=CUDA).unsqueeze(1),
        gaussian(600, 64, 6) * 10 ** torch.linspace(-3, 3, 600, device=CUDA).unsqueeze(1),
    ),
    "all equal": lambda: (torch.zeros(500, 8, device=CUDA), torch.zeros(70, 8, device=CUDA)),
    "one point": lambda: (gaussian(1, 768), gaussian(16_384, 768, 5)),
    "more than a round": lambda: (gaussian(300_000, 64), gaussian(512, 64, 5)),
}


def in_fp64(points, centroids):
    exact = centroids.double()
    return torch.cat([nearest_in_fp64(part, exact) for part in points.split(8192)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_assignment_is_that_of_fp64(case, variant):
    points, centroids = CASES[case]()
    assigner = make_variant(CUDA, variant)
    assigner.set_centroids(centroids)
    codes = assigner.assign(PointBatch(0, points))
    assert int((codes != in_fp64(points, centroids)).sum()) == 0


@pytest.mark.parametrize("recheck", RECHECKS)
def test_every_recheck_gives_the_same(recheck):
    points, centroids = CASES["gaussian"]()
    assigner = make_variant(CUDA, recheck=recheck)
    assigner.set_centroids(centroids)
    assert torch.equal(assigner.assign(PointBatch(0, points)), in_fp64(points, centroids))


def test_few_points_are_doubtful():
    points, centroids = CASES["gaussian"]()
    assigner = ExactAssigner(CUDA)
    assigner.set_centroids(centroids)
    assigner.assign(PointBatch(0, points))
    assert len(points) <= int(assigner.rechecked) < 3 * len(points)
    assert assigner.doubtful < 0.02 * len(points)


@pytest.mark.parametrize(
    "clusters,width,count", [(8192, 768, 50_000), (100, 50, 1001), (40_000, 64, 30_000), (1, 8, 5)]
)
def test_sums_equal_those_of_the_cpu(clusters, width, count):
    points = gaussian(count, width)
    codes = torch.randint(clusters, (count,), generator=torch.Generator(CUDA).manual_seed(1), device=CUDA)
    codes[: count // 3] = clusters // 2
    scale = scale_for(count, float(points.abs().max()))
    sums = torch.zeros(clusters, width, dtype=torch.int64, device=CUDA)
    counts = torch.zeros(clusters, dtype=torch.int64, device=CUDA)
    kernels.add_points_sorted(sums, counts, points, codes, scale)
    expected = torch.zeros(clusters, width, dtype=torch.int64).index_add_(
        0, codes.cpu(), (points.cpu() * scale).to(torch.int64)
    )
    assert torch.equal(sums.cpu(), expected)
    assert torch.equal(counts.cpu(), codes.cpu().bincount(minlength=clusters))


def test_lloyd_on_the_gpu_agrees_with_the_cpu(tmp_path, monkeypatch):
    import numpy as np
    from calls import train_kmeans

    from digit_ds.clustering import kmeans

    np.save(tmp_path / "points.npy", gaussian(40_000, 64).cpu().numpy())
    on_gpu = train_kmeans(tmp_path / "points.npy", 256, tmp_path / "gpu.npy", iterations=5, backend="triton")
    monkeypatch.setattr(kmeans, "make_assigner", lambda backend, device: TorchAssigner(torch.device("cpu")))
    on_cpu = train_kmeans(tmp_path / "points.npy", 256, tmp_path / "cpu.npy", iterations=5)
    np.testing.assert_allclose(on_gpu["inertia"], on_cpu["inertia"], rtol=1e-5)
    close = np.isclose(np.load(tmp_path / "gpu.npy"), np.load(tmp_path / "cpu.npy"), atol=1e-4).all(1)
    assert close.mean() > 0.95  # a point at equal distance in fp32 may go either way


def test_faiss_on_the_gpu_is_exact_but_for_fp32s_rounding():
    import faiss

    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        pytest.skip("faiss has no GPU support here")
    points, centroids = gaussian(20_000, 768), gaussian(8192, 768, 9)
    assigner = FaissAssigner(CUDA)
    assert assigner.device.type == "cuda"
    assigner.set_centroids(centroids)
    codes = assigner.assign(PointBatch(0, points))
    exact = torch.cdist(points.double(), centroids.double())
    chosen = exact.gather(1, codes[:, None])[:, 0]
    assert (chosen - exact.amin(1)).max() < 1e-4  # TF32 would choose centroids that are 1e-2 farther away
