"""Histograms of oriented gradients (Dalal and Triggs, CVPR 2005): a description of strokes that hardly changes
when they move a little.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 8
"""Side of a cell in pixels."""
DIRECTIONS = 8
"""Bins of a cell, around the whole circle."""


def describe(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> float32 [B, DIRECTIONS * (H / CELL) * (W / CELL)].

    A gradient's length is shared between the two nearest directions; each cell is divided by the root of the energy of
    the 3 x 3 cells around it.
    """
    grey = images.clamp(0, 1).mean(1)
    down = F.pad(grey[:, 2:] - grey[:, :-2], (0, 0, 1, 1))
    right = F.pad(grey[:, :, 2:] - grey[:, :, :-2], (1, 1))
    bins = torch.arange(DIRECTIONS).view(-1, 1, 1)
    away = (torch.atan2(down, right)[:, None] * (DIRECTIONS / (2 * math.pi)) - bins).remainder(DIRECTIONS)
    share = (1 - torch.minimum(away, DIRECTIONS - away)).clamp_min(0)
    cells = F.avg_pool2d(share * torch.hypot(down, right)[:, None], CELL)  # [B, DIRECTIONS, h, w]
    energy = F.avg_pool2d(cells.square().sum(1, keepdim=True), 3, stride=1, padding=1)
    return (cells / (energy.sqrt() + 0.02)).flatten(1)
