"""Nearest centroids: the back ends faiss, torch and triton behind one small interface."""

from typing import Any, Protocol, get_args

import torch

from digit_ds.clustering.settings import Backend
from digit_ds.clustering.shard import PointBatch
from digit_ds.errors import UserError

# Scores a CPU holds at once: 8 Mi float32, 32 MiB.
_CPU_SCORES = 1 << 23
_GPU_SCORES = 1 << 28


class Assigner(Protocol):
    """The interface of a back end of Lloyd's algorithm."""

    name: str
    device: torch.device

    def set_centroids(self, centroids: torch.Tensor) -> None:
        """Take the centroids, float32 [K, D], centred as the points are."""

    def assign(self, batch: PointBatch) -> torch.Tensor:
        """Index of the nearest centroid (L2) of each point, int64 [n]; the lower index where two are equally near."""


class TorchAssigner:
    """Plain torch: an fp32 matrix product a tile and its arg-max."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def set_centroids(self, centroids: torch.Tensor) -> None:
        """See ``Assigner``."""
        self._transposed = centroids.to(self.device).t().contiguous()  # [D, K]
        self._half_squares = self._transposed.double().square().sum(0).div(2).float()

    def assign(self, batch: PointBatch) -> torch.Tensor:
        """See ``Assigner``. The nearest centroid is the one with the largest x.c - |c|^2 / 2."""
        budget = _GPU_SCORES if self.device.type == "cuda" else _CPU_SCORES
        rows = max(1, budget // self._transposed.shape[1])
        codes = [
            torch.addmm(self._half_squares, part, self._transposed, beta=-1).argmax(1)
            for part in batch.points.split(rows)
        ]
        return torch.cat(codes)


class FaissAssigner:
    """faiss's exact flat index, on the GPU where faiss was built for it."""

    name = "faiss"

    def __init__(self, device: torch.device) -> None:
        import faiss
        import faiss.contrib.torch_utils  # indexes then take torch tensors

        self._faiss = faiss
        on_gpu = device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
        self.device = device if on_gpu else torch.device("cpu")
        self._resources = faiss.StandardGpuResources() if on_gpu else None

    def set_centroids(self, centroids: torch.Tensor) -> None:
        """See ``Assigner``."""
        index: Any = self._faiss.IndexFlatL2(centroids.shape[1])
        if self._resources is not None:
            index = self._faiss.index_cpu_to_gpu(self._resources, self.device.index or 0, index)
        index.add(centroids.to(self.device).contiguous())
        self._index = index

    def assign(self, batch: PointBatch) -> torch.Tensor:
        """See ``Assigner``."""
        return self._index.search(batch.points, 1)[1][:, 0]


def make_assigner(backend: str, device: torch.device) -> Assigner:
    """The back end called ``backend`` for ``device``; ``auto``: triton on a GPU, else faiss, else torch."""
    if backend not in get_args(Backend):
        raise UserError(f"backend {backend!r} is not known, expected one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        preferred = "triton" if device.type == "cuda" else "faiss"
        backend = preferred if _available(preferred) else "torch"
    if backend in ("faiss", "triton") and not _available(backend):
        package = {"faiss": "faiss-cpu or faiss-gpu (not both)", "triton": "triton"}[backend]
        raise UserError(f"backend is {backend}, which is not installed, expected package {package} or another backend")
    if backend == "triton":
        if device.type != "cuda":
            raise UserError("backend triton needs a CUDA device and found none, expected backend faiss or torch here")
        from digit_ds.clustering.exact import ExactAssigner

        return ExactAssigner(device)
    return FaissAssigner(device) if backend == "faiss" else TorchAssigner(device)


def _available(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True
