"""First-stage tokens that are given instead of drawn: from pictures, or from a file of tokens.

Shapes: ``B`` images, ``G`` tokens of an image.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from digit_ds.data.images import Crops, UnreadableImageError, class_name, decode, upright_rgb
from digit_ds.data.sources.opening import list_source, open_source
from digit_ds.errors import UserError
from digit_ds.files import read_json, sha256
from digit_ds.generation.pipeline import BLOCK
from digit_ds.identity import DISCRIMINATIVE, VQ, Part
from digit_ds.safe_load import load_npz


class Source(Protocol):
    """Gives the first-stage codes of every image of a job."""

    count: int
    """Images there are."""
    identity: dict[str, Any]
    """What it is, for the job's settings."""

    def codes(self, images: Tensor) -> Tensor:
        """int64 [B] image numbers -> int64 [B, G]."""


class TokenFile:
    """Tokens of an ``.npz`` such as a sampling job leaves: the array ``name``, integers [N, G].

    Raises:
        UserError: the file or the array is missing or does not fit.
    """

    def __init__(self, path: Path | str, name: str, tokens: int, codes: int):
        values = load_npz(path, name)[name]
        if values.ndim != 2 or values.shape[1] != tokens or not np.issubdtype(values.dtype, np.integer):
            raise UserError(f"{path}: {name} is {values.dtype} {list(values.shape)}, expected integers [N, {tokens}]")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < codes:
            raise UserError(f"{path}: {name} has codes {values.min()}..{values.max()}, expected 0..{codes - 1}")
        self._codes = torch.from_numpy(values.astype(np.int64))
        self.count = len(values)
        self.identity = {"tokens_sha256": sha256(path)}
        self.part = Part(f"tokens {path}", _origin(Path(path), VQ if name == "vq" else DISCRIMINATIVE))
        """What the codes mean, where a sampling job wrote them; others do not say it."""

    def codes(self, images: Tensor) -> Tensor:
        """int64 [B] -> int64 [B, G]."""
        return self._codes[images]


def _origin(tokens: Path, keys: Mapping[str, str]) -> dict[str, Any]:
    """What the sampling job that wrote the file says of the vocabulary."""
    manifest = tokens.with_name("manifest.json")
    if tokens.name != "tokens.npz" or not manifest.is_file():
        return {}
    found = read_json(manifest)
    origin = found.get("provenance") if isinstance(found, dict) else None
    return {key: origin[key] for key in keys if key in origin} if isinstance(origin, dict) else {}


class _Pictures(ABC):
    """Pictures, cut to ``size`` in their centre and tokenised on demand.

    ``encode`` gives the codes int64 [B, G] of float images [B, 3, size, size] in [0, 1].
    """

    count: int
    identity: dict[str, Any]

    def __init__(self, size: int, resize: int, encode: Callable[[Tensor], Tensor], device: torch.device):
        self._crops = Crops(kind="training", size=size, resize=resize, views=1, seed=0)
        self._encode, self._device = encode, device

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """int64 [B] -> int64 [B, G]; always a full block at a time, so that rounding does not depend on the batch."""
        codes = []
        for block in images.split(BLOCK):
            pictures = np.stack([self.picture(int(image)) for image in block])
            padded = torch.from_numpy(pictures)[torch.arange(BLOCK).clamp(max=len(block) - 1)]
            floats = padded.to(self._device).permute(0, 3, 1, 2).float() / 255
            codes.append(self._encode(floats)[: len(block)].cpu())
        return torch.cat(codes)

    @abstractmethod
    def picture(self, image: int) -> np.ndarray:
        """uint8 [size, size, 3], as it is tokenised."""


class ImageFolder(_Pictures):
    """Pictures of a folder or of archives (``data.sources``) in sorted order."""

    def __init__(
        self,
        root: Path | str,
        size: int,
        resize: int,
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        labels: Path | str | None = None,
    ):
        super().__init__(size, resize, encode, device)
        self._source = open_source(root, labels=labels)
        self.names = list_source(self._source)
        self.count = len(self.names)
        names_hash = hashlib.sha256("\0".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()
        self.identity = {"image_names_sha256": names_hash, "resize": resize}

    def folders(self) -> list[str | None]:
        """The class folder of every picture; None: it lies in no folder."""
        return [class_name(name) for name in self.names]

    def picture(self, image: int) -> np.ndarray:
        """uint8 [size, size, 3], as it is tokenised."""
        name = self.names[image]
        try:
            return self._crops.cut(decode(self._source.read(name)), name)[0]
        except UnreadableImageError as error:
            raise UserError(f"{self._source.root}/{name}: is not a readable image ({error})") from error


class GivenImages(_Pictures):
    """Pictures in memory: PIL images, or files that are read when they are needed."""

    def __init__(
        self,
        images: Sequence[Image.Image | Path | str],
        size: int,
        resize: int,
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
    ):
        super().__init__(size, resize, encode, device)
        self._images, self.count, self.identity = images, len(images), {}

    def picture(self, image: int) -> np.ndarray:
        """uint8 [size, size, 3], as it is tokenised."""
        given = self._images[image]
        try:
            picture = upright_rgb(given) if isinstance(given, Image.Image) else decode(given)
        except UnreadableImageError as error:
            name = f"image {image}" if isinstance(given, Image.Image) else given
            raise UserError(f"{name}: is not a readable image ({error})") from error
        return self._crops.cut(picture, str(image))[0]
