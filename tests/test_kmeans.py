"""K-Means: agreement with faiss, independence of the number of processes, resumption, refusals."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from calls import train_kmeans
from ports import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from digit_ds.clustering import points as points_module
from digit_ds.clustering.fixed_point import add_points, scale_for
from digit_ds.clustering.points import open_points
from digit_ds.clustering.splitting import split_clusters
from digit_ds.errors import UserError
from digit_ds.files import read_json, sha256, write_json

TOOL = Path(__file__).parents[1] / "tools" / "train_kmeans.py"


def blobs(count, width, centres, seed=0):
    random = np.random.default_rng(seed)
    middle = random.normal(size=(centres, width)) * 2 + 3
    return (middle[random.integers(centres, size=count)] + random.normal(size=(count, width))).astype(np.float32)


def write_features(folder, array, chunk_rows, dtype=np.float16):
    folder.mkdir()
    chunks = []
    for number, start in enumerate(range(0, len(array), chunk_rows)):
        name = f"chunk-{number:05d}.npy"
        np.save(folder / name, array[start : start + chunk_rows].astype(dtype))
        rows = len(array[start : start + chunk_rows])
        chunks.append({"file": name, "rows": rows, "sha256": sha256(folder / name)})
    provenance = {"encoder_sha256": "e" * 64, "layer": 3, "transform": "centre-crop"}
    manifest = {"format": 1, "provenance": provenance, "count": len(array), "width": array.shape[1]}
    write_json(folder / "manifest.json", manifest | {"dtype": np.dtype(dtype).name, "chunks": chunks})
    return folder


def start_tool(arguments, processes=1):
    """Start ``processes`` ranks of the tool, with the environment a launcher would give them."""
    port = free_port()
    started = []
    for rank in range(processes):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(TOOL.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, str(TOOL), *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    return started


def run_tool(arguments, processes=1):
    """(exit status, stdout, stderr) of each rank."""
    started = start_tool(arguments, processes)
    outputs = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs)]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_agrees_with_faiss_from_the_same_centroids(tmp_path, backend):
    array = blobs(20_000, 24, 40)
    start = array[:64].copy()
    np.save(tmp_path / "points.npy", array)
    np.save(tmp_path / "start.npy", start)
    facts = train_kmeans(
        tmp_path / "points.npy", 64, tmp_path / "km.npy", backend=backend, init=str(tmp_path / "start.npy")
    )
    reference = faiss.Kmeans(24, 64, niter=20, max_points_per_centroid=10**9, min_points_per_centroid=1)
    reference.train(array, init_centroids=start)
    np.testing.assert_allclose(facts["inertia"], reference.obj, rtol=1e-4)
    index = faiss.IndexFlatL2(24)
    index.add(np.load(tmp_path / "km.npy"))
    ours = index.search(array, 1)[1]
    theirs = reference.index.search(array, 1)[1]
    assert (ours == theirs).mean() >= 0.999
    assert facts["points"] == 20_000 and facts["used_codes"] + facts["dead_codes"] == 64


def test_empty_clusters_are_split_as_faiss_splits_them(tmp_path):
    array = blobs(3000, 8, 5, seed=7)
    start = array[:16].copy()
    start[10:] += 1000  # these six never win a point
    np.save(tmp_path / "points.npy", array)
    np.save(tmp_path / "start.npy", start)
    facts = train_kmeans(
        tmp_path / "points.npy",
        16,
        tmp_path / "km.npy",
        iterations=3,
        backend="torch",
        init=str(tmp_path / "start.npy"),
    )
    reference = faiss.Kmeans(8, 16, niter=3, max_points_per_centroid=10**9, min_points_per_centroid=1)
    reference.train(array, init_centroids=start)
    assert facts["empty_clusters_split"] == sum(step["nsplit"] for step in reference.iteration_stats) >= 6
    np.testing.assert_allclose(np.load(tmp_path / "km.npy"), reference.centroids, atol=1e-4)


def test_a_cluster_of_one_point_is_never_split():
    centroids = np.arange(8, dtype=np.float32).reshape(4, 2) + 1
    counts = np.array([1, 0, 5, 0])
    assert split_clusters(centroids, counts) == 2
    np.testing.assert_array_equal(centroids[0], [1, 2])
    assert len(np.unique(centroids, axis=0)) == 4


def test_reported_inertia_is_that_of_all_points(tmp_path):
    array = blobs(9000, 6, 9, seed=2) + 1000  # far from the origin: the textbook formula in fp32 fails here
    np.save(tmp_path / "points.npy", array)
    facts = train_kmeans(tmp_path / "points.npy", 16, tmp_path / "km.npy", iterations=4)
    distances = np.square(array[:, None].astype(np.float64) - np.load(tmp_path / "km.npy").astype(np.float64)).sum(-1)
    assert facts["final_inertia"] == pytest.approx(distances.min(1).sum(), rel=1e-6)
    counts = np.bincount(distances.argmin(1), minlength=16)
    shares = counts[counts > 0] / len(array)
    assert facts["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert facts["inertia"] == sorted(facts["inertia"], reverse=True)


def test_features_directory_and_array_give_the_same_codebook(tmp_path):
    array = blobs(20_000, 5, 9, seed=3).astype(np.float16).astype(np.float32)
    np.save(tmp_path / "points.npy", array)
    folder = write_features(tmp_path / "features", array, 3_333)
    train_kmeans(tmp_path / "points.npy", 12, tmp_path / "a.npy", iterations=3)
    facts = train_kmeans(folder, 12, tmp_path / "b.npy", iterations=3)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    beside = json.loads((tmp_path / "b.json").read_text())
    assert beside["layer"] == 3 and beside["kmeans"]["points"] == 20_000
    assert (tmp_path / "b.run" / "usage.png").stat().st_size > 1000
    curves = EventAccumulator(str(tmp_path / "b.run" / "tb")).Reload()
    values = {name: [event.value for event in curves.Scalars(f"kmeans/{name}")] for name in ("inertia", "points")}
    np.testing.assert_allclose(values["inertia"], facts["inertia"], rtol=1e-6)
    assert values["points"] == [20_000] * 3
    assert {"kmeans/dead_codes", "kmeans/perplexity", "kmeans/used_codes"} <= set(curves.Tags()["scalars"])
    assert not (tmp_path / "b.run" / "state.npz").exists()


def test_parallel_seeding_beats_random(tmp_path):
    array = blobs(9000, 4, 30, seed=4)
    array[:4500] = array[0] + np.random.default_rng(0).normal(size=(4500, 4)).astype(np.float32) * 0.01
    np.save(tmp_path / "points.npy", array)
    seeded = train_kmeans(tmp_path / "points.npy", 32, tmp_path / "a.npy", iterations=1, init="k-means++")
    random = train_kmeans(tmp_path / "points.npy", 32, tmp_path / "b.npy", iterations=1, init="random")
    assert seeded["inertia"][0] < 0.7 * random["inertia"][0]


def test_parallel_seeding_with_fewer_different_points_than_clusters(tmp_path):
    array = np.repeat(np.eye(4, dtype=np.float32), 10, 0)
    np.save(tmp_path / "points.npy", array)
    facts = train_kmeans(tmp_path / "points.npy", 8, tmp_path / "km.npy", iterations=2, init="k-means++")
    assert np.load(tmp_path / "km.npy").shape == (8, 4)
    assert facts["used_codes"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("init,worlds", [("random", (2, 4)), ("k-means++", (3,))])
def test_any_number_of_processes_gets_the_same_centroids(tmp_path, init, worlds):
    array = blobs(45_000, 6, 12, seed=5)
    folder = write_features(tmp_path / "features", array, 10_000)
    train_kmeans(folder, 16, tmp_path / "alone.npy", iterations=4, init=init)
    for world in worlds:
        out = tmp_path / f"{world}.npy"
        ranks = run_tool(
            ["--features", folder, "--clusters", 16, "--out", out, "--iterations", 4, "--init", init], world
        )
        assert all(status == 0 for status, _, _ in ranks), ranks
        np.testing.assert_array_equal(np.load(out), np.load(tmp_path / "alone.npy"))
        assert (tmp_path / "alone.json").read_text() == out.with_suffix(".json").read_text()


@pytest.mark.fault(
    "kill -9 of any rank at any moment",
    stage="K-Means",
    outcome="the same call continues after the last iteration; equal bytes",
    status="-",
    lost="at most the iteration under way",
)
@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    array = blobs(60_000, 32, 50, seed=6)
    np.save(tmp_path / "points.npy", array)
    out, state, lock = (tmp_path / name for name in ("km.npy", "km.run/state.npz", "km.run/.lock"))
    arguments = ["--features", tmp_path / "points.npy", "--clusters", 256, "--iterations", 40, "--out", out]
    train_kmeans(tmp_path / "points.npy", 256, tmp_path / "whole.npy", iterations=40)
    random = np.random.default_rng(0)
    for victim in (1, 0):
        ranks = start_tool(arguments, 2)
        deadline = time.time() + 120
        begun = f'"pid": {ranks[0].pid}}}'
        while not (state.exists() and begun in lock.read_text()) and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.5))
        with pytest.raises(UserError, match=f"process {ranks[0].pid} on .* is writing there"):
            train_kmeans(tmp_path / "points.npy", 256, out, iterations=40)
        assert ranks[victim].poll() is None, "the run ended before it could be killed"
        ranks[victim].kill()
        for process in ranks:  # as a launcher does when a rank is gone
            process.kill()
            process.communicate()
    ((status, output, errors),) = run_tool(arguments)
    assert status == 0, errors
    assert "continuing after iteration" in output
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert out.with_suffix(".json").read_text() == (tmp_path / "whole.json").read_text()


MEMORY = """
import resource, sys
from digit_ds.clustering.kmeans import train_kmeans
from digit_ds.clustering.settings import KMeansSettings

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def cluster(points, out):
    parts = {"features": f"{sys.argv[1]}/{points}.npy", "out": f"{sys.argv[1]}/{out}.npy"}
    train_kmeans(KMeansSettings(**parts, clusters=8, iterations=1))

cluster("small", "a")  # imports, thread pools
before = peak()
cluster("large", "b")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_points(tmp_path):
    array = np.random.default_rng(0).random((1 << 18, 128), np.float32).astype(np.float16)  # 64 MiB
    np.save(tmp_path / "large.npy", array)
    np.save(tmp_path / "small.npy", array[:20_000])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) < 44  # MiB


def test_a_second_run_does_nothing_and_another_run_is_refused(tmp_path, capsys):
    np.save(tmp_path / "points.npy", blobs(500, 4, 4))
    first = train_kmeans(tmp_path / "points.npy", 4, tmp_path / "km.npy", iterations=2)
    before = (tmp_path / "km.npy").stat().st_mtime_ns
    assert train_kmeans(tmp_path / "points.npy", 4, tmp_path / "km.npy", iterations=2) == first
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "km.npy").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="of another run"):
        train_kmeans(tmp_path / "points.npy", 4, tmp_path / "km.npy", iterations=2, seed=1)


def test_fixed_point_sums_ignore_order_and_keep_small_numbers():
    random = torch.Generator().manual_seed(0)
    points = torch.randn(4096, 3, generator=random) * torch.tensor([1e3, 1.0, 1e-3])
    codes = torch.randint(5, (4096,), generator=random)
    scale = scale_for(4096, float(points.abs().max()))
    forwards, backwards = torch.zeros(2, 5, 3, dtype=torch.int64)
    counts = torch.zeros(5, dtype=torch.int64)
    add_points(forwards, counts, points, codes, scale)
    add_points(backwards, torch.zeros_like(counts), points.flip(0), codes.flip(0), scale)
    assert torch.equal(counts, codes.bincount(minlength=5))
    assert torch.equal(forwards, backwards)
    exact = torch.zeros(5, 3, dtype=torch.float64).index_add_(0, codes, points.double())
    torch.testing.assert_close(forwards.double() / scale, exact, rtol=1e-9, atol=1e-9)


def test_fixed_point_cannot_overflow():
    for count, magnitude in [(1, 1.0), (2**40, 3e4), (10, 1e-30), (7, 2.0**20)]:
        assert count * magnitude * scale_for(count, magnitude) < 2**62


def test_blocks_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(points_module, "BLOCK_ROWS", 7)
    array = np.arange(40, dtype=np.float32).reshape(20, 2)
    points = open_points(write_features(tmp_path / "features", array, 6, np.float32))
    np.testing.assert_array_equal(np.concatenate([points.block(n) for n in range(points.blocks)]), array)
    np.testing.assert_array_equal(points.rows(np.array([19, 0, 6])), array[[19, 0, 6]])


def test_refusals(tmp_path):
    good = blobs(50, 4, 4)
    np.save(tmp_path / "points.npy", good)
    np.save(tmp_path / "start.npy", good[:4, :3])
    np.save(tmp_path / "flat.npy", good[0])
    np.save(tmp_path / "ids.npy", np.arange(8).reshape(4, 2))
    bad = good.copy()
    bad[7, 2] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    flipped = write_features(tmp_path / "flipped", good, 20)
    chunk = flipped / "chunk-00001.npy"
    content = bytearray(chunk.read_bytes())
    content[-3] ^= 1
    chunk.write_bytes(content)
    (tmp_path / "empty").mkdir()
    mislabelled = write_features(tmp_path / "mislabelled", good, 20)
    write_json(mislabelled / "manifest.json", read_json(mislabelled / "manifest.json") | {"dtype": "bf16"})

    def refused(match, features="points.npy", clusters=4, out="km.npy", **options):
        with pytest.raises(UserError, match=match) as caught:
            train_kmeans(tmp_path / features, clusters, tmp_path / out, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "km.npy").exists()

    refused("does not exist", features="nowhere")
    refused("no manifest.json", features="empty")
    refused(r"holds 50 points, expected at least as many as clusters \(51\)", clusters=51)
    refused("nan.npy: row 7 holds NaN", features="nan.npy")
    refused("chunk-00001.npy: its bytes do not match", features="flipped")
    refused(r"initial centroids are \[4, 3\], expected \[4, 4\]", init=str(tmp_path / "start.npy"))
    refused("cannot be read", init=str(tmp_path / "nothing.npy"))
    refused("floating-point", features="flat.npy")
    refused("floating-point", features="ids.npy")
    refused(r"chunk-00000.npy: holds float16 .*, expected the bits of bfloat16", features="mislabelled")
    refused("clusters is 0, expected: greater than or equal to 1", clusters=0)
    refused("km.txt: is not a valid name for a codebook, expected a name that ends in .npy", out="km.txt")
    refused("triton needs a CUDA device|not installed", backend="triton") if not torch.cuda.is_available() else None


def test_the_command_says_one_sentence(tmp_path):
    ranks = run_tool(["--features", tmp_path / "nowhere", "--clusters", 4, "--out", tmp_path / "km.npy"], 2)
    assert [status for status, _, _ in ranks] == [2, 2], ranks
    assert ranks[0][2].count("\n") == 1 and "nowhere: does not exist" in ranks[0][2]
    assert ranks[1][2] == ""
    assert not (tmp_path / "km.npy").exists()


def test_few_points_a_cluster_are_said(tmp_path, capsys):
    np.save(tmp_path / "few.npy", np.random.default_rng(0).standard_normal((59, 4)).astype(np.float32))
    for clusters, said in ((2, True), (1, False)):
        train_kmeans(tmp_path / "few.npy", clusters, tmp_path / f"{clusters}.npy", iterations=1)
        warned = "holds 59 points, 29.5 per cluster, expected at least 30"
        assert (warned in capsys.readouterr().err) == said
    with pytest.raises(UserError, match="initial centroids"):
        train_kmeans(tmp_path / "few.npy", 2, tmp_path / "refused.npy", init=str(tmp_path / "few.npy"))
    assert "warning" not in capsys.readouterr().err, "a refused job warns of nothing"
