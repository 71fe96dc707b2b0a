"""Empty clusters are split as in faiss."""

import numpy as np

_NUDGE = np.float32(1 / 1024)


def split_clusters(centroids: np.ndarray, counts: np.ndarray) -> int:
    """Give each empty cluster half of a populous one, in place; returns how many were split.

    As ``faiss.Clustering``: the cluster to split is drawn with probability (its size - 1) / (points - clusters),
    from a Mersenne twister that starts anew with seed 1234 each time; both halves start at its centroid, moved by
    1/1024 of every coordinate in opposite directions.

    Args:
        centroids: float32 [K, D], in the coordinates of the features.
        counts: points of each cluster, [K].
    """
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return 0
    sizes = counts.astype(np.float32)
    clusters = len(sizes)
    spare = np.float32(counts.sum() - clusters)
    twister = np.random.RandomState(1234)  # the same 32-bit stream as std::mt19937(1234)
    draws = np.empty(0, np.float32)
    signs = np.where(np.arange(centroids.shape[1]) % 2 == 0, _NUDGE, -_NUDGE)
    for target in empty:
        while True:
            while len(draws) < clusters:
                fresh = twister.randint(0, 2**32, size=4 * clusters, dtype=np.uint32)
                draws = np.concatenate([draws, fresh.astype(np.float32) / np.float32(2**32)])
            with np.errstate(divide="ignore", invalid="ignore"):
                chances = ((sizes.astype(np.float64) - 1) / spare).astype(np.float32)
            hits = np.flatnonzero(draws[:clusters] < chances)
            if len(hits):
                break
            draws = draws[clusters:]
        source = hits[0]
        draws = draws[source + 1 :]
        centroids[target] = centroids[source] * (1 + signs)
        centroids[source] = centroids[source] * (1 - signs)
        sizes[target] = sizes[source] / 2
        sizes[source] -= sizes[target]
    return len(empty)
