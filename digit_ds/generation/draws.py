"""Random numbers that belong to an image: the same for image 17 in any batch, on any rank, on CPU and on GPU.

A counter-based generator (Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps
(seed, image, purpose, position) to a number without any state, so nothing has to be drawn in order or carried over.
"""

import math

import torch
from torch import Tensor

PRIOR, PIXELS, CONFIDENCE = range(3)
"""Purposes: tokens of the prior, tokens of the pixel decoder, the noise on a parallel decoder's confidence."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four counters of 32 bits -> four random words of 32 bits, all held in broadcastable int64 tensors."""
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        # The product of two 32-bit numbers wraps around in a signed 64-bit integer, but its bits are right.
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0, word1, word2, word3 = (
            ((product1 >> 32) & _WORD) ^ word1 ^ key0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ word3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return [word0, word1, word2, word3]


def philox_uniforms(seed: int, images: Tensor, purpose: int, count: int, step: int = 0) -> Tensor:
    """Numbers in the open interval (0, 1).

    Args:
        seed: the job's seed, 0 .. 2^64 - 1.
        images: int64 [B], global image numbers.
        purpose: which of the independent streams of an image.
        count: how many numbers of an image.
        step: iteration of a parallel decoder; each has its own numbers.

    Returns:
        float64 [B, count] on the device of ``images``.
    """
    images = images[:, None]
    positions = torch.arange(count, device=images.device)[None]
    stream = torch.full_like(positions, purpose + 256 * step)
    words = philox([positions, stream, images & _WORD, images >> 32], (seed & _WORD, (seed >> 32) & _WORD))
    # 52 bits and a half: exact in float64, never 0 and never 1.
    return ((((words[0] >> 6) << 26) + (words[1] >> 6)).double() + 0.5) * math.ldexp(1.0, -52)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in (0, 1)."""
    return -torch.log(-torch.log(uniform))
