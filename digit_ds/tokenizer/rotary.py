"""DINOv3's rotary positions: queries and keys of patches are turned by angles of row and column.

Shapes: `B` images, `G` patches, `E` width, `H` heads, `D` = E / H channels of a head.
"""

import math
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models.vision_transformer import Block
from torch import Tensor

_BASE = 100.0


def default_periods(head_channels: int) -> Tensor:
    """Periods [D / 4] of the published models, for files without them; Meta's files hold them, rounded to bfloat16."""
    return _BASE ** (torch.arange(head_channels // 4, dtype=torch.float64) * 4 / head_channels)


def rotation(periods: Tensor, grid: int) -> Tensor:
    """Sines and cosines, float64 [G, 2 * D], for a square of grid x grid patches.

    Patch centres run from -1 to 1; the angles of the rows come first, then those of the columns, and both twice
    (facebookresearch/dinov3, layers/rope_position_encoding.py with ``normalize_coords="separate"``).
    """
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid * 2 - 1
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    angles = torch.cat([2 * math.pi * axis.flatten()[:, None] / periods.double() for axis in (rows, columns)], 1)
    return torch.cat([angles.sin().tile(2), angles.cos().tile(2)], 1)


class _Attention(AttentionRope):
    """timm's, turning channel i with channel i + D / 2."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **(options | {"rotate_half": True}))


class RotaryBlock(Block):
    """A pre-norm block whose attention turns queries and keys of all tokens after the first ``prefix``."""

    def __init__(self, *, prefix: int, **options: Any):
        super().__init__(**(options | {"attn_layer": _Attention}))
        self.attn.num_prefix_tokens = prefix  # type: ignore[assignment]  # an attribute, no module

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:  # type: ignore[override]  # timm's takes a mask here
        """Tokens [B, prefix + G, E] and a ``rotation`` -> the same shape; LayerScale is in the weights."""
        x = x + self.attn(self.norm1(x), rope=turns)
        return x + self.mlp(self.norm2(x))
