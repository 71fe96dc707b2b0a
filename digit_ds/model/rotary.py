"""Rotary positions on the token grid: queries and keys are rotated by their row and column.

Rotary embedding (arXiv 2104.09864) along two axes, as autoregressive image models use it (LlamaGen, arXiv 2406.06525):
half of each head's width is rotated by the row, half by the column, so that an attention score depends on the relative
position of two tokens and not on their absolute positions.

- The start token (BOS or class) is at (0, 0): it is not rotated. The token of row r and column c, counted from 0,
  is at (r + 1, c + 1): none is at the start's position, and the distance from the start gives the absolute position.
- A pixel decoder's discriminative token and VQ token of one patch are at the same position. Their
  vocabularies are separate, so that their embeddings distinguish them.

Shapes: ``B`` images, ``T`` tokens, ``H`` heads, ``D`` width.
"""

import torch
from torch import Tensor

from digit_ds.model.spec import TransformerSpec

BASE = 10000.0
"""Frequency k of n along an axis is BASE ** (-k / n); the value of both papers."""


def rotation(spec: TransformerSpec, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Cosines and sines for ``positions`` of the whole sequence; None for a model with position tables.

    Args:
        positions: int64 [T], or [B, T] where each image has an order of its own.

    Returns:
        [2, T, 1, 1, D / H / 2] or [2, B, T, 1, 1, D / H / 2], broadcast against queries and keys [B, T, H, 2, D / H],
        in ``dtype``, or in float32 if that is narrower: bfloat16 is too coarse for the angles.
    """
    if spec.positions != "rotary2d":
        return None
    angle_count = spec.head_width // 4  # of each axis; an angle rotates two numbers
    columns, own = spec.grid[1], positions - spec.prefix_length
    patch = torch.where(own < 0, positions, own - 1)
    place = torch.stack([patch // columns + 1, patch % columns + 1], dim=-1)  # [..., T, 2]
    place = torch.where((own == 0).unsqueeze(-1), 0, place).double()
    exponents = torch.arange(angle_count, device=positions.device, dtype=torch.float64) / angle_count
    angles = (place.unsqueeze(-1) * BASE**-exponents).flatten(-2)  # [..., T, D / H / 2], rows first
    turn = torch.stack([angles.cos(), angles.sin()]).to(torch.promote_types(dtype, torch.float32))
    return turn[..., None, None, :]


def rotate(qk: Tensor, turn: Tensor) -> Tensor:
    """Rotate queries and keys [B, T, H, 2, D / H] by :func:`rotation`; numbers j and j + D / H / 2 are a pair."""
    cosine, sine = turn.unbind()
    first, second = qk.to(turn.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(qk.dtype)
