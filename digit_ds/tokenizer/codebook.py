"""Features -> discriminative tokens: the nearest of the K-Means centroids, and the file that holds them.

Shapes: `N` features, `K` codes, `E` width.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.files import read_json, sha256, write_atomically, write_json
from digit_ds.safe_load import load_npy
from digit_ds.tokenizer.precision import without_tf32

_CPU_DISTANCES, _GPU_DISTANCES = 1 << 24, 1 << 28  # held at a time: 64 MiB and 1 GiB


class Codebook:
    """K centroids; ``assign`` turns features into codes 0..K-1.

    Attributes:
        centroids: float32 [K, E].
        codes: K.
        provenance: what the centroids were made from, as ``save_codebook`` was told; empty for a bare ``.npy``.
        sha256: of the ``.npy`` file.
    """

    def __init__(self, centroids: Tensor, provenance: dict[str, Any], file_hash: str, path: Path | str):
        self.centroids = centroids
        self.provenance = provenance
        self.sha256 = file_hash
        self.codes, self.width = centroids.shape
        self._path = path

    def assign(self, features: Tensor) -> Tensor:
        """Index of the nearest centroid, int64 [...], of features [..., E].

        The published rule: argmin of |f|^2 - 2 f.c + |c|^2 in float32, the lowest index where distances are equal.
        Half-precision features are raised to float32 first (bfloat16 on a GPU: by an exact splitting of the
        centroids instead, see ``split_centroids``). TF32 stays off whatever the caller set: its ten mantissa bits
        are too few to tell close centroids apart. Features are taken in chunks, so that the distances never need
        more than 64 MiB (1 GiB on a GPU).

        Raises:
            UserError: the features have another width than the centroids.
        """
        if features.shape[-1] != self.width:
            raise UserError(
                f"{self._path}: its centroids have width {self.width}, expected {features.shape[-1]}, the width of the "
                "features"
            )
        return nearest(features, self.centroids, self._split if _is_split(features) else None)

    @cached_property
    def _split(self) -> Tensor:
        return split_centroids(self.centroids)


def load_codebook(path: Path | str, device: torch.device | str = "cpu") -> Codebook:
    """Load centroids from a ``.npy`` file [K, E], and their provenance from the ``.json`` beside it if there is one.

    Raises:
        UserError: the file is no two-dimensional array of finite floating-point numbers, or the provenance beside it
            was written for another file.
    """
    path = Path(path)
    array = load_npy(path, "one .npy array of centroids [codes, width]")
    if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"{path}: holds {array.dtype} of shape {list(array.shape)}, expected floating-point centroids "
            "[codes, width]"
        )
    centroids = torch.from_numpy(array.astype(np.float32))
    if not centroids.isfinite().all():
        raise UserError(f"{path}: holds centroids that are infinite or not a number, expected finite ones")
    file_hash, sidecar = sha256(path), path.with_suffix(".json")
    provenance = read_json(sidecar) if sidecar.exists() else {}
    if not isinstance(provenance, dict):
        raise UserError(f"{sidecar}: does not hold a JSON object, expected the provenance of {path.name}")
    described = provenance.pop("codebook_sha256", file_hash)
    if described != file_hash:
        raise UserError(
            f"{sidecar}: describes a file with SHA-256 {described}, expected {file_hash}, that of {path.name}"
        )
    return Codebook(centroids.to(device), provenance, file_hash, path)


def save_codebook(path: Path | str, centroids: np.ndarray | Tensor, provenance: dict[str, Any]) -> None:
    """Write centroids [K, E] as float32 ``.npy`` (the published layout) with ``provenance`` as ``.json`` beside it.

    Each file is written atomically; the ``.json`` also names the ``.npy`` file's hash, so that the two cannot be
    mixed up.

    Raises:
        UserError: the path does not end in ``.npy``.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise UserError(f"{path}: is not a valid name for a codebook, expected a name that ends in .npy")
    array = np.ascontiguousarray(torch.as_tensor(centroids).detach().cpu().numpy(), dtype=np.float32)
    write_atomically(path, lambda temporary: np.save(temporary, array, allow_pickle=False))
    write_json(path.with_suffix(".json"), {**provenance, "codebook_sha256": sha256(path)})


@torch.no_grad()
def nearest(features: Tensor, centroids: Tensor, split: Tensor | None = None) -> Tensor:
    """Index int64 [...] of the row of ``centroids`` [K, E] nearest to each of ``features`` [..., E]; see ``assign``.

    ``split`` is what ``split_centroids`` makes of the centroids, where it is at hand.
    """
    flat = features.reshape(-1, features.shape[-1])  # [N, E]
    centroids = centroids.float()
    index_of: Callable[[Tensor, Tensor], Tensor]
    if _is_split(flat):
        index_of, operand = _nearest_split, split_centroids(centroids) if split is None else split
    else:
        index_of, operand = _nearest_published, centroids
    codes = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    rows = max(1, (_GPU_DISTANCES if flat.is_cuda else _CPU_DISTANCES) // len(centroids))
    for start in range(0, len(flat), rows):
        codes[start : start + rows] = index_of(flat[start : start + rows], operand)
    return codes.view(features.shape[:-1])


def _nearest_published(features: Tensor, centroids: Tensor) -> Tensor:
    features = features.float()
    with without_tf32(features):
        distances = features @ centroids.T  # [N, K]
    distances.mul_(-2).add_(features.square().sum(1, keepdim=True)).add_(centroids.square().sum(1))
    return distances.argmin(1)


def _is_split(features: Tensor) -> bool:
    return features.is_cuda and features.dtype == torch.bfloat16


def _nearest_split(features: Tensor, split: Tensor) -> Tensor:
    return torch.mm(beside(features, split), split.T, out_dtype=torch.float32).argmax(1)


def split_centroids(centroids: Tensor) -> Tensor:
    """The bfloat16 matrix R [K, X] of float32 ``centroids``, for ``beside``.

    For bfloat16 features only: each float32 of the centroids is the exact sum of three bfloat16 numbers, so a
    bfloat16 product accumulated in float32 sums the very products that a float32 one would, at several times its
    speed. The small parts stand first, so that they are added while the sum is small.
    """
    halves = centroids.square().sum(1, keepdim=True) / -2  # [K, 1]
    right = torch.cat([*reversed(_split(centroids)), *_split(halves)], 1)
    return torch.nn.functional.pad(right, (0, -right.shape[1] % 8))  # tensor cores need rows of a multiple of 16 bytes


def beside(features: Tensor, split: Tensor) -> Tensor:
    """The matrix L [N, X] of bfloat16 ``features`` [N, E] with (L R^T)[n, k] = f.c - |c|^2 / 2 for R = ``split``.

    The argmax of a row is the nearest centroid.
    """
    ones = features.new_ones(len(features), 3)
    rest = features.new_zeros(len(features), split.shape[1] - 3 * features.shape[1] - 3)
    return torch.cat([features, features, features, ones, rest], 1)


def _split(values: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors, large to small, whose sum is the float32 ``values``."""
    parts = []
    for _ in range(3):
        parts.append(values.bfloat16())
        values = values - parts[-1].float()
    return parts
