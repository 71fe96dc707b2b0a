"""Images -> tokens: encoder, codebook and VQGAN that belong together.

Shapes: `B` images, `G` tokens of an image, `E` encoder width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.identity import ENCODER, Part, check_agreement
from digit_ds.tokenizer.codebook import Codebook, load_codebook
from digit_ds.tokenizer.encoder import Encoder, load_encoder
from digit_ds.tokenizer.precision import precision_dtype
from digit_ds.tokenizer.vqgan import load_vqgan

LARGEST_CODE = np.iinfo(np.uint16).max
"""Tokens are stored as uint16."""


class Tokenizer:
    """Encoder, codebook and, if given, VQGAN that belong together: images -> both kinds of tokens."""

    def __init__(
        self,
        encoder: Path | str,
        codebook: Path | str,
        vqgan: Path | str | None,
        *,
        vqgan_config: Path | str | None = None,
        layer: int | None = 3,
        num_heads: int | None = None,
        image_size: int | None = None,
        precision: str = "fp32",
        compile: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load the three and refuse what does not fit together: width, provenance, token grid.

        Args:
            encoder: weights, as for ``load_encoder``.
            codebook: centroids, as for ``load_codebook``.
            vqgan: checkpoint, as for ``load_vqgan``; None: discriminative tokens alone.
            vqgan_config: as for ``load_vqgan``.
            layer: which block from the end gives the features; None: the codebook's own, else 3.
            num_heads: as for ``load_encoder``.
            image_size: side of the images; None: the largest that the encoder takes.
            precision: arithmetic of encoder and VQGAN, ``fp32``, ``bf16`` or ``fp16``.
            compile: fuse encoder and VQGAN with torch.compile.
            device: where all of them run.

        Raises:
            UserError: a file cannot be used, or two of them do not belong together.
        """
        device, dtype = torch.device(device), precision_dtype(precision)
        self.codebook = load_codebook(codebook, device=device)
        if layer is None:
            layer = self.codebook.provenance.get("layer") or 3
        self.encoder = load_encoder(encoder, layer, num_heads, device=device, dtype=dtype)
        self.vqgan = load_vqgan(vqgan, vqgan_config, device=device, dtype=dtype) if vqgan else None
        if self.vqgan is not None and device.type == "cuda":
            self.vqgan.network.to(memory_format=torch.channels_last)
        self.image_size = image_size or max(self.encoder.image_sizes)
        self.grid = list(self.encoder.grid(self.image_size))
        _check_codebook(self.codebook, Path(codebook), self.encoder, Path(encoder))
        if self.vqgan is not None:
            factor = self.vqgan.downsampling
            vq_grid = [self.image_size // factor] * 2
            if self.image_size % factor or vq_grid != self.grid:
                raise UserError(
                    f"{vqgan}: makes {vq_grid[0]} x {vq_grid[1]} tokens of an image of {self.image_size} pixels, but "
                    f"{encoder} makes {self.grid[0]} x {self.grid[1]}; expected the same grid"
                )
            if self.vqgan.codes - 1 > LARGEST_CODE:
                raise UserError(f"{vqgan}: has {self.vqgan.codes} codes, expected at most {LARGEST_CODE + 1}")
        if compile:
            self.encoder.compile()
            if self.vqgan is not None:
                self.vqgan.network.encoder.compile()

    @property
    def vq_codes(self) -> int:
        """N, 0 without a VQGAN."""
        return self.vqgan.codes if self.vqgan is not None else 0

    def provenance(self) -> dict[str, Any]:
        """Which files and which transform the tokens come from."""
        return self.encoder.provenance() | {
            "image_size": self.image_size,
            "codebook_sha256": self.codebook.sha256,
            "vqgan_sha256": self.vqgan.sha256 if self.vqgan is not None else None,
        }

    def discriminative(self, images: Tensor) -> Tensor:
        """Float [B, 3, H, W] in [0, 1] -> discriminative codes, int64 [B, G]."""
        return self.codebook.assign(self.encoder(images))

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Float [B, 3, H, W] in [0, 1] -> discriminative codes and, with a VQGAN, VQ codes: int64 [B, G] each."""
        codes = self.discriminative(images)
        return (codes,) if self.vqgan is None else (codes, self.vqgan.encode(images))


def _check_codebook(codebook: Codebook, path: Path, encoder: Encoder, weights: Path) -> None:
    """Refuse a codebook that was not made from this encoder's features."""
    width = codebook.centroids.shape[1]
    if width != encoder.width:
        raise UserError(
            f"{path}: has centroids of width {width}, expected {encoder.width}, the width of the features of {weights}"
        )
    if codebook.codes - 1 > LARGEST_CODE:
        raise UserError(f"{path}: has {codebook.codes} codes, expected at most {LARGEST_CODE + 1}")
    check_agreement(
        [Part(f"codebook {path}", codebook.provenance), Part(f"encoder {weights}", encoder.provenance())], ENCODER
    )
