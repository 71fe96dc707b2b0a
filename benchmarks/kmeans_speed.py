"""Seconds of one K-Means iteration on one GPU, beside the floor that the matrix product sets.

    python benchmarks/kmeans_speed.py [--points 2097152] [--width 768] [--clusters 8192] [--out speed.json]

For i.i.d. Gaussian points and for clustered ones, with drawn points as centroids (the first iteration) and with the
centroids after some iterations: plain torch, faiss on the GPU where there is one, and every variant of the exact
assignment, with the time of each stage, how much was rechecked, and assignments that differ from fp64's.
"""

import argparse
import json
import statistics
import time
import traceback
from itertools import pairwise
from pathlib import Path

import torch
from kmeans_variants import DEFAULT, RECHECKS, VARIANTS, make_variant

from digit_ds.clustering.assignment import FaissAssigner
from digit_ds.clustering.exact import nearest_in_fp64
from digit_ds.clustering.fixed_point import add_points, scale_for
from digit_ds.clustering.shard import PointBatch

CUDA = torch.device("cuda")


def seconds(work, repeats=3):
    """Median seconds of ``work()`` on the GPU, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def make_points(kind, count, width):
    """Centred float32 points on the GPU."""
    generator = torch.Generator(CUDA).manual_seed(0)
    points = torch.randn(count, width, generator=generator, device=CUDA)
    if kind == "clustered":
        centres = torch.randn(2000, width, generator=generator, device=CUDA) * 1.5
        for part in points.split(1 << 18):
            part += centres[torch.randint(2000, (len(part),), generator=generator, device=CUDA)]
    return points.sub_(points.mean(0))


def floor(count, width, clusters):
    """Matrix-product rates and the seconds they mean for one assignment."""
    flop = 2 * count * width * clusters
    for label, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a = torch.randn(8192, 8192, device=CUDA, dtype=dtype)
        rate = 2 * 8192**3 / seconds(lambda a=a: a @ a, 10)
        b = torch.randn(32768, width, device=CUDA, dtype=dtype)
        c = torch.randn(clusters, width, device=CUDA, dtype=dtype)
        own = 2 * 32768 * width * clusters / seconds(lambda b=b, c=c: b @ c.t(), 10)
        yield {
            "what": f"floor {label}",
            "square_tflops": rate / 1e12,
            "own_shape_tflops": own / 1e12,
            "seconds": flop / rate,
            "own_shape_seconds": flop / own,
        }


def plain(points, centroids, dtype, rows=32768):
    """Matrix product in ``dtype`` and arg-min over distances."""
    narrow, squares = centroids.to(dtype), centroids.square().sum(1)
    return torch.cat([(squares - 2 * (part.to(dtype) @ narrow.t()).float()).argmin(1) for part in points.split(rows)])


def reference(points, centroids):
    """Codes in fp64."""
    exact = centroids.double()
    return torch.cat([nearest_in_fp64(part, exact) for part in points.split(16384)])


def stage_times(assigner, batch):
    """Milliseconds of each stage of one ``assign``, by events on the stream."""
    marks = []

    def mark(stage):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((stage, event))

    assigner._stages.timer = mark
    torch.cuda.synchronize()
    mark("begin")
    assigner.assign(batch)
    mark("fp64")
    torch.cuda.synchronize()
    assigner._stages.timer = lambda stage: None
    times = {}
    for (_, before), (stage, after) in pairwise(marks):
        times[stage] = times.get(stage, 0.0) + before.elapsed_time(after)
    return {stage: round(value, 3) for stage, value in times.items()}


def measure(label, work):
    """Run ``work`` and print its result or its error."""
    try:
        facts = {"what": label} | work()
    except Exception as error:
        traceback.print_exc(limit=-3)
        facts = {"what": label, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
        torch.cuda.empty_cache()
    print(json.dumps(facts), flush=True)
    return facts


def ours(batch, centroids, truth, maxima, recheck):
    """Times and mismatches of one variant."""
    assigner = make_variant(CUDA, maxima, recheck)
    count, width = batch.points.shape
    scale = scale_for(count, float(batch.points.abs().max()))
    sums = torch.zeros(len(centroids), width, dtype=torch.int64, device=CUDA)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=CUDA)
    assigner.set_centroids(centroids)
    codes = assigner.assign(batch)

    def iteration():
        assigner.set_centroids(centroids)
        found = assigner.assign(batch)
        sums.zero_()
        counts.zero_()
        add_points(sums, counts, batch.points, found, scale)
        return (sums.double() / scale / counts.clamp(min=1).unsqueeze(1)).float()

    return {
        "iteration_seconds": seconds(iteration),
        "assign_seconds": seconds(lambda: assigner.assign(batch)),
        "update_seconds": seconds(lambda: add_points(sums, counts, batch.points, codes, scale)),
        "set_centroids_seconds": seconds(lambda: assigner.set_centroids(centroids)),
        "stage_ms": stage_times(assigner, batch),
        "pairs_per_point": int(assigner.rechecked) / count,
        "doubtful": assigner.doubtful,
        "mismatches": int((codes != truth).sum()),
    }


def faiss_gpu(batch, centroids, truth):
    """faiss's flat index on the GPU."""
    assigner = FaissAssigner(CUDA)
    if assigner.device.type != "cuda":
        return {"failed": "faiss has no GPU support here"}
    assigner.set_centroids(centroids)
    codes = assigner.assign(batch)
    return {
        "assign_seconds": seconds(lambda: assigner.assign(batch), 1),
        "mismatches": int((codes != truth).sum()),
    }


def compare(kind, asked, results):
    """All ways of assigning points of one ``kind``; appends to ``results``."""
    points = make_points(kind, asked.points, asked.width)
    batch = PointBatch(0, points)
    centroids = points[torch.randperm(asked.points, generator=torch.Generator().manual_seed(1))[: asked.clusters]]
    run_all(f"{kind}, first", kind == "gaussian", batch, centroids, asked.variants, results)
    for _ in range(asked.later):
        codes = plain(points, centroids, torch.bfloat16)
        sums = torch.zeros_like(centroids).index_add_(0, codes, points)
        sizes = codes.bincount(minlength=asked.clusters).unsqueeze(1)
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
    run_all(f"{kind}, later", False, batch, centroids, asked.variants, results)


def run_all(label, everything, batch, centroids, variants, results):
    """All ways on one set of points and centroids; ``everything``: also what is slow and always the same."""
    truth = reference(batch.points, centroids)

    def plain_facts(dtype, repeats):
        wrong = int((plain(batch.points, centroids, dtype) != truth).sum())
        took = seconds(lambda: plain(batch.points, centroids, dtype), repeats)
        return {"assign_seconds": took, "mismatches": wrong}

    def run(what, work):
        results.append(measure(f"{what}, {label}", work))

    run("torch bf16", lambda: plain_facts(torch.bfloat16, 2))
    if everything:
        run("torch fp32", lambda: plain_facts(torch.float32, 1))
        run("faiss", lambda: faiss_gpu(batch, centroids, truth))
    for name in variants:
        run(f"ours {name}", lambda name=name: ours(batch, centroids, truth, name, "64"))
    for name in list(RECHECKS)[1:]:
        run(
            f"ours {DEFAULT} recheck {name}",
            lambda name=name: ours(batch, centroids, truth, DEFAULT, name),
        )


def main():
    """Measure everything and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=2_097_152)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--clusters", type=int, default=8192)
    parser.add_argument("--later", type=int, default=4, help="iterations before the later centroids")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), help="of the tile maxima")
    parser.add_argument("--out", type=Path, help="JSON file")
    asked = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for facts in floor(asked.points, asked.width, asked.clusters):
        print(json.dumps(facts), flush=True)
        results.append(facts)
    for kind in ("gaussian", "clustered"):
        compare(kind, asked, results)
        torch.cuda.empty_cache()
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
    if asked.out:
        asked.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
