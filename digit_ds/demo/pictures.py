"""Grids of digits with labels, as PIL images."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ENLARGED = 2
GAP = 4
MARGIN = 22
"""Width of the column of labels."""
BACKGROUND, INK = (247, 247, 247), (40, 40, 40)


def labelled_grid(images: Tensor, labels: np.ndarray, columns: int) -> Image.Image:
    """The first ``columns`` images [B, 3, H, W] of each label, one row per label in rising order."""
    names = sorted(set(labels.tolist()))
    return named_rows([(str(name), images[np.flatnonzero(labels == name)[:columns]]) for name in names])


def named_rows(rows: list[tuple[str, Tensor]], margin: int = MARGIN) -> Image.Image:
    """One row of images [B, 3, H, W] after each name; ``margin`` is the width kept for the names."""
    side = rows[0][1].shape[-1] * ENLARGED
    columns = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (margin + columns * (side + GAP), len(rows) * (side + GAP) + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for row, (name, images) in enumerate(rows):
        top = GAP + row * (side + GAP)
        draw.text((6, top + side // 2), name, INK, font, anchor="lm")
        for column, image in enumerate(images):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + column * (side + GAP), top))
    return canvas
