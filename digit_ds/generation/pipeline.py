"""From models to pixels: prior -> pixel decoder -> VQGAN.

Shapes: ``B`` images, ``G`` tokens of an image.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.generation.draws import PIXELS, PRIOR
from digit_ds.generation.maskgit import MaskGitSampler
from digit_ds.generation.samplers import AutoregressiveSampler, Sampler
from digit_ds.generation.settings import Decoding
from digit_ds.model.transformer import Transformer
from digit_ds.tokenizer.vqgan import Vqgan, to_uint8

BLOCK = 16
"""Images that the VQGAN decodes together, always the same ones (0..15, 16..31, ...): their pixels do not depend on the
batch."""


class Codes(NamedTuple):
    """Tokens of a batch, int64 [B, G] on the CPU."""

    discriminative: Tensor | None
    """None for the baseline that writes VQ tokens itself."""
    vq: Tensor


def make_sampler(model: Transformer, decoding: Decoding, seed: int, rows: int) -> Sampler:
    """The sampler that fits a model: parallel for ``nar``, autoregressive for everything else."""
    purpose = PIXELS if model.spec.vocabulary.has_prefix else PRIOR
    kind = MaskGitSampler if model.spec.kind == "nar" else AutoregressiveSampler
    return kind(model, decoding, seed, purpose, rows)


class Pipeline:
    """Samples tokens and decodes them to pixels.

    Args:
        prior: writes discriminative tokens (or, a ``vq`` model, VQ tokens); None: they are always given.
        pixels: the pixel decoder's sampler; None after a ``vq`` prior.
        vqgan: decodes VQ tokens to pixels.
    """

    def __init__(self, prior: Sampler | None, pixels: Sampler | None, vqgan: Vqgan):
        self.prior, self.pixels, self.vqgan = prior, pixels, vqgan
        last = pixels or prior
        assert last is not None
        self.grid, self.device = last.spec.grid, last.device

    def write(self, images: Tensor, labels: Tensor | None = None, known: Tensor | None = None) -> Codes:
        """Write the tokens of ``images`` (int64 [B], global numbers).

        ``labels`` int64 [B] for a class-conditional prior; ``known`` int64 [B, G]: codes of the first stage that are
        given, -1 where they are to be written.
        """
        first = known if self.prior is None else self.prior(images, labels, known=known)
        assert first is not None  # without a prior all tokens are given
        if self.pixels is None:
            return Codes(None, first)
        return Codes(first, self.pixels(images, prefix=first))

    @torch.inference_mode()
    def paint(self, vq: Tensor) -> np.ndarray:
        """VQ codes [B, G] of at most one block -> uint8 [B, H, W, 3].

        Raises:
            UserError: the VQGAN's numbers overflow in its precision.
        """
        padded = vq[torch.arange(BLOCK).clamp(max=len(vq) - 1)]
        pixels = self.vqgan.decode(padded.unflatten(1, self.grid).to(self.device))
        finite = pixels.isfinite().all()
        pictures = to_uint8(pixels)[: len(vq)].permute(0, 2, 3, 1).cpu().numpy()
        if not finite:
            raise UserError(
                "the VQGAN's output is not finite, expected finite pixels; if it runs in float16, use bfloat16"
            )
        return pictures
