"""Initial centroids: drawn points, k-means|| or a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from digit_ds.clustering.assignment import Assigner
from digit_ds.clustering.collective import add_up
from digit_ds.clustering.points import BLOCK_ROWS, Points
from digit_ds.clustering.shard import Shard
from digit_ds.errors import UserError
from digit_ds.files import read_json
from digit_ds.identity import ENCODER, Part, check_agreement
from digit_ds.parallel.decide import from_main, gather
from digit_ds.safe_load import load_npy

# k-means|| (Bahmani et al. 2012): each round draws about as many candidates as there are clusters; five rounds are
# where the paper's results level off.
_ROUNDS = 5


def random_centroids(points: Points, clusters: int, seed: int) -> np.ndarray:
    """``clusters`` different points, float32 [K, D]."""
    numbers = np.random.default_rng(seed).choice(points.count, clusters, replace=False, shuffle=False)
    return from_main(lambda: points.rows(np.sort(numbers)))


def centroids_from_file(
    path: Path | str, clusters: int, width: int, provenance: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Centroids float32 [K, D] stored as a ``.npy`` file.

    Raises:
        UserError: the file is no such array, or the provenance beside it names another encoder than ``provenance``,
            that of the features.
    """
    centroids = load_npy(path, "random, k-means++ or a .npy array of initial centroids for --init")
    if centroids.shape != (clusters, width):
        raise UserError(f"{path}: initial centroids are {list(centroids.shape)}, expected [{clusters}, {width}]")
    if centroids.dtype.kind != "f" or not np.isfinite(centroids).all():
        raise UserError(
            f"{path}: initial centroids hold {centroids.dtype} values not all finite, expected finite floating point"
        )
    sidecar = Path(path).with_suffix(".json")
    if provenance and sidecar.is_file():
        check_agreement([Part(f"initial centroids {path}", read_json(sidecar)), Part("features", provenance)], ENCODER)
    return centroids.astype(np.float32)


def parallel_centroids(
    points: Points, shard: Shard, assigner: Assigner, mean: np.ndarray, clusters: int, seed: int
) -> np.ndarray:
    """k-means++ seeding in its parallel form, k-means||: float32 [K, D], the same for any number of processes.

    Every round takes each point with probability ``clusters * d^2 / sum of d^2``, drawn from the seed and the
    point's block. What was taken, weighted by the points nearest to it, is then thinned out by k-means++.
    """
    first = int(np.random.default_rng(seed).integers(points.count))
    taken = [np.array([first])]
    nearest = np.zeros(shard.count, np.int64)  # place in `taken` of the candidate nearest to each own point
    distances = np.full(shard.count, np.inf, np.float32)
    for round_number in range(_ROUNDS + 1):
        offset = sum(len(numbers) for numbers in taken[:-1])
        _bring_nearer(shard, assigner, mean, points.rows(taken[-1]), offset, nearest, distances)
        total = float(add_up(torch.tensor(distances.sum(dtype=np.float64))))
        if round_number == _ROUNDS or total == 0:
            break
        drawn = _draw(shard, distances, clusters / total, [seed, round_number])
        everyone = np.sort(np.concatenate(gather(drawn)))
        taken.append(everyone)
    numbers = np.concatenate(taken)
    weights = add_up(torch.from_numpy(np.bincount(nearest, minlength=len(numbers)))).numpy()
    if len(numbers) < clusters:
        # So few different points that the candidates are all of them: fill up with any others; Lloyd splits the empty.
        others = np.setdiff1d(np.arange(min(points.count, clusters + len(numbers))), numbers)
        numbers = np.concatenate([numbers, others[: clusters - len(numbers)]])
        return from_main(lambda: points.rows(numbers))
    return from_main(lambda: _cluster_candidates(points.rows(numbers), weights, clusters, seed, assigner.device))


def _bring_nearer(
    shard: Shard,
    assigner: Assigner,
    mean: np.ndarray,
    candidates: np.ndarray,
    offset: int,
    nearest: np.ndarray,
    distances: np.ndarray,
) -> None:
    """Update ``nearest`` and ``distances`` of the own points, in place, by new ``candidates`` [C, D]."""
    if not len(candidates):
        return
    centred = torch.from_numpy((candidates - mean).astype(np.float32)).to(assigner.device)
    assigner.set_centroids(centred)
    base = shard.first * BLOCK_ROWS
    for batch in shard.batches(mean):
        codes = assigner.assign(batch)
        squares = (batch.points - centred[codes]).square().sum(1).cpu().numpy()
        own = slice(batch.start - base, batch.start - base + len(squares))
        nearer = squares < distances[own]
        distances[own][nearer] = squares[nearer]
        nearest[own][nearer] = codes.cpu().numpy()[nearer] + offset


def _draw(shard: Shard, distances: np.ndarray, rate: float, entropy: list[int]) -> np.ndarray:
    """Numbers of the own points that this round takes."""
    drawn = []
    base = shard.first * BLOCK_ROWS
    for block in range(shard.first, shard.last):
        own = distances[block * BLOCK_ROWS - base : (block + 1) * BLOCK_ROWS - base]
        chances = np.random.default_rng([*entropy, block]).random(len(own))
        drawn.append(np.flatnonzero(chances < own.astype(np.float64) * rate) + block * BLOCK_ROWS)
    return np.concatenate(drawn) if drawn else np.empty(0, np.int64)


def _cluster_candidates(
    candidates: np.ndarray, weights: np.ndarray, clusters: int, seed: int, device: torch.device
) -> np.ndarray:
    """Weighted k-means++ on the candidates [C, D]: draw ``clusters`` of them, each by weight times squared distance."""
    generator = np.random.default_rng([seed, _ROUNDS + 1])
    rows = torch.from_numpy(candidates).to(device)
    rows = rows - rows.mean(0)
    squares = rows.square().sum(1)
    weight = torch.from_numpy(weights).to(device, torch.float64)
    distances = torch.full_like(squares, torch.inf)
    chosen: list[int] = []
    for place in range(clusters):
        # An untouched point has chance weight x distance; before the first draw all are equally far.
        mass = weight * (distances.double() if place else 1.0)
        cumulated = mass.cumsum(0)
        if float(cumulated[-1]) <= 0:  # only copies of chosen points are left
            left = np.setdiff1d(np.arange(len(candidates)), chosen)
            chosen.extend(left[: clusters - place].tolist())
            break
        pick = int(torch.searchsorted(cumulated, float(cumulated[-1]) * generator.random(), right=True))
        pick = min(pick, len(candidates) - 1)
        chosen.append(pick)
        torch.minimum(distances, (squares + squares[pick] - 2 * (rows @ rows[pick])).clamp_(min=0), out=distances)
        distances[pick] = 0
    return candidates[chosen]
