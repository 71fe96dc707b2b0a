"""Lloyd's algorithm over all points and all processes: features in, codebook out.

Each process assigns and sums its own share of the points; sums and counts are added up in 64-bit fixed point, so that
any number of processes, and a run resumed after a kill, gets the same centroids. Nothing is subsampled.
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from digit_ds.clustering.assignment import Assigner, make_assigner
from digit_ds.clustering.collective import add_up, largest
from digit_ds.clustering.fixed_point import add_points, scale_for
from digit_ds.clustering.points import Points, open_points
from digit_ds.clustering.record import Record, State, usage
from digit_ds.clustering.seeding import centroids_from_file, parallel_centroids, random_centroids
from digit_ds.clustering.settings import KMeansSettings
from digit_ds.clustering.shard import Shard
from digit_ds.clustering.splitting import split_clusters
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.parallel.decide import fail_together, from_main, gather, together
from digit_ds.parallel.launch import device, initialize, is_main, rank, world_size
from digit_ds.parallel.progress import progress
from digit_ds.tokenizer.codebook import save_codebook
from digit_ds.workdir import WorkDirectory

FEW = 30
"""Points a cluster below which a warning is given (faiss warns below 39)."""
# fp64 numbers handled at once when centroids are moved
_CPU_NUMBERS, _GPU_NUMBERS = 1 << 20, 1 << 26


def train_kmeans(settings: KMeansSettings) -> dict[str, Any]:
    """Cluster all points of ``features`` and write the codebook ``out`` (.npy [K, D]) with its provenance beside it.

    Works alone and under torchrun or srun. The folder ``OUT.run`` (``km.run`` for ``km.npy``) gets TensorBoard events,
    the picture ``usage.png`` and, until the codebook is written, the state of the last iteration; the same call
    again continues from there, and does nothing when the codebook is complete.

    Returns:
        What the codebook's provenance says under ``kmeans``: points, inertia of each iteration and of the result (sum
        of squared distances over all points), used and dead codes, perplexity, empty clusters split.

    Raises:
        UserError: unreadable or unsuitable features, initial centroids of another shape, ``out`` of another run.
    """
    initialize()
    out = Path(settings.out)
    points = from_main(lambda: _opened(settings.features, settings.clusters, out))
    identity = from_main(
        lambda: (
            settings.record()
            | {"features": points.identity()}
            | ({} if settings.init in ("random", "k-means++") else {"init": sha256(settings.init)})
        )
    )
    record = Record(out, identity)
    with WorkDirectory(record.folder, record.finished, bool) as directory:
        if directory.found:
            if is_main():
                print(f"{out}: is complete already, nothing to do")
            return directory.found
        return _train(points, record, identity, settings)


def _train(points: Points, record: Record, identity: dict[str, Any], settings: KMeansSettings) -> dict[str, Any]:
    """Cluster and write the codebook; see ``train_kmeans``."""
    out, iterations = record.out, settings.iterations
    assigner = _assigner(settings.backend)
    shard = Shard(points, rank(), world_size(), assigner.device)
    state = from_main(record.load)
    if state is None:
        state = _start(points, shard, assigner, settings)
        record.save(state)
    elif is_main():
        print(f"{out}: continuing after iteration {state.iteration} of {iterations}")
    counts = _iterate(state, points, shard, assigner, iterations, record)
    facts = {
        "settings": identity,
        "backend": assigner.name,
        "points": points.count,
        "inertia": state.inertia[:iterations],
        "final_inertia": state.inertia[iterations],
        "empty_clusters_split": state.split,
        **usage(counts),
    }
    from_main(
        lambda: record.finish(
            facts, counts, lambda: save_codebook(out, state.centroids, points.provenance | {"kmeans": facts})
        )
    )
    return facts


def _assigner(backend: str) -> Assigner:
    """The back end; when a process cannot have it, all exit with the first one's message."""
    with together():
        return make_assigner(backend, device())


def _opened(features: Path | str, clusters: int, out: Path) -> Points:
    """Open the features and refuse what cannot be clustered."""
    if out.suffix != ".npy":
        raise UserError(f"{out}: is not a valid name for a codebook, expected a name that ends in .npy")
    points = open_points(features)
    if points.count < clusters:
        raise UserError(f"{features}: holds {points.count} points, expected at least as many as clusters ({clusters})")
    return points


def _warn_of_few(points: Points, clusters: int, features: Path | str) -> None:
    """Warn on rank 0 of so few points per cluster that the centroids fit noise."""
    if is_main() and points.count < FEW * clusters:
        print(
            f"warning: {features}: holds {points.count} points, {points.count / clusters:.1f} per cluster, expected at "
            f"least {FEW}; with fewer the centroids fit noise",
            file=sys.stderr,
        )


def _start(points: Points, shard: Shard, assigner: Assigner, settings: KMeansSettings) -> State:
    """Read all points once (hashes of the files, finite numbers, the mean) and choose the first centroids."""
    clusters, seed, init = settings.clusters, settings.seed, settings.init
    centroids = None
    if init not in ("random", "k-means++"):  # refused before the points are read
        centroids = from_main(lambda: centroids_from_file(init, clusters, points.width, points.provenance))
    _warn_of_few(points, clusters, settings.features)
    mean, magnitude = _survey(points, shard)
    if init == "random":
        centroids = random_centroids(points, clusters, seed)
    elif init == "k-means++":
        centroids = parallel_centroids(points, shard, assigner, mean, clusters, seed)
    assert centroids is not None
    return State(0, centroids, mean, scale_for(points.count, 2 * magnitude), None, [], 0)


def _survey(points: Points, shard: Shard) -> tuple[np.ndarray, float]:
    """Mean of all points (fp64 [D], rounded) and their largest absolute coordinate."""
    problem = None
    for number, (path, digest) in enumerate(points.files):
        if digest and number % world_size() == rank() and sha256(path) != digest:
            problem = f"{path}: its bytes do not match the checksum in manifest.json"
            break
    fail_together(problem)
    total, magnitude = np.zeros(points.width), 0.0
    with progress(total=shard.count, description="reading the points", unit="points") as bar:
        for number, rows in shard.raw():
            extreme = float(np.abs(rows).max())
            if not extreme < 1e15:  # also where it is NaN; squares of larger numbers leave fp32
                bad = int(np.flatnonzero(~(np.abs(rows) < 1e15).all(1))[0])
                problem = f"{points.describe(number, bad)} holds NaN, infinity or huge numbers, expected finite ones"
                break
            total += rows.sum(0, dtype=np.float64)
            magnitude = max(magnitude, extreme)
            bar.update(len(rows))
    fail_together(problem)
    total = add_up(torch.from_numpy(total)).numpy()
    magnitude = float(largest(torch.tensor(magnitude, dtype=torch.float64)))
    # Rounded to a coarse grid: the mean is only a good origin for fp32, and so is the same for any number of processes.
    grid = 2.0 ** (np.frexp(max(magnitude, 2.0**-60))[1] - 12)
    return np.round(total / points.count / grid) * grid, magnitude


def _iterate(
    state: State, points: Points, shard: Shard, assigner: Assigner, iterations: int, record: Record
) -> np.ndarray:
    """Run the iterations that are left and one more assignment that measures the result; points per code [K]."""
    left = iterations + 1 - state.iteration
    with progress(total=left * shard.count, description="k-means", unit="points") as bar:
        while True:
            began = time.perf_counter()
            sums, counts = _assign_and_sum(state, shard, assigner, bar)
            inertia, centroids = _move(state, sums, counts)
            state.inertia.append(inertia)
            sizes = counts.cpu().numpy()
            if state.iteration == iterations:
                return sizes
            state.centroids = centroids
            split = split_clusters(state.centroids, sizes)
            state.split += split
            state.iteration += 1
            record.save(state)
            record.log(state, sizes, split, time.perf_counter() - began)
            bar.set_postfix_str(f"iteration {state.iteration}/{iterations}, inertia/point {inertia / points.count:.6g}")


def _move(state: State, sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, np.ndarray]:
    """Inertia of the assignment that ``sums`` and ``counts`` are of, and each cluster's mean, float32 [K, D].

    The sum of |x - c|^2 over all points follows from what is summed already. In parts, since K x D numbers in fp64 are
    as much as all else that a process holds.
    """
    clusters, width = sums.shape
    moved = np.empty((clusters, width), np.float32)
    assert state.spread is not None  # known since the points were first read
    inertia = state.spread
    codes_at_once = max(1, (_GPU_NUMBERS if sums.is_cuda else _CPU_NUMBERS) // width)
    for part in range(0, clusters, codes_at_once):
        own = slice(part, part + codes_at_once)
        centred = torch.from_numpy(state.centroids[own] - state.mean).to(sums.device)  # fp64 [part of K, D]
        exact = sums[own].double().div_(state.scale)
        per_code = counts[own] * centred.square().sum(1) - 2 * (exact * centred).sum(1)
        inertia += math.fsum(per_code.tolist())  # a sum over threads would depend on their number
        exact /= counts[own].clamp(min=1).unsqueeze(1)
        moved[own] = exact.cpu().numpy() + state.mean
    return inertia, moved


def _assign_and_sum(state: State, shard: Shard, assigner: Assigner, bar: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed-point sums int64 [K, D] and counts int64 [K] of all processes' points by their nearest centroid."""
    clusters, width = state.centroids.shape
    assigner.set_centroids(torch.from_numpy((state.centroids - state.mean).astype(np.float32)))
    squares = []
    sums = torch.zeros(clusters, width, dtype=torch.int64, device=assigner.device)
    counts = torch.zeros(clusters, dtype=torch.int64, device=assigner.device)
    for batch in shard.batches(state.mean):
        codes = assigner.assign(batch)
        add_points(sums, counts, batch.points, codes, state.scale)
        if state.spread is None:
            squares.append(math.fsum(batch.points.square().sum(1, dtype=torch.float64).tolist()))
        bar.update(len(codes))
    if state.spread is None:
        # fsum rounds once, so that the order and the number of processes do not matter.
        state.spread = math.fsum(square for own in gather(squares) for square in own)
    return add_up(sums), add_up(counts)
