"""Pictures as files: PNGs, a labelled grid, and the one array that ADM's evaluator reads."""

import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from digit_ds.data.images import open_image
from digit_ds.files import write_atomically

GREY = 160
"""Level of what is not shown."""

FAST_COMPRESSION = 1
"""zlib level of the PNGs: three times as fast as the default, for files about a tenth larger."""

GRID_ROWS, GRID_COLUMNS = 16, 10


class Originals(NamedTuple):
    """Given pictures, which the grid shows above what was made of them."""

    picture: Callable[[int], np.ndarray]
    """Image number -> uint8 [H, W, 3]."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    keep: int | None
    """Leading tokens that were kept; None: all."""


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] atomically."""
    write_atomically(path, lambda temporary: Image.fromarray(picture).save(temporary, compress_level=FAST_COMPRESSION))


def read_png(path: Path) -> np.ndarray:
    """Read a picture as uint8 [H, W, 3]."""
    with open_image(path) as image:
        return np.asarray(image.convert("RGB"))


def write_adm_array(
    path: Path, pictures: Iterator[np.ndarray], shape: tuple[int, ...], labels: np.ndarray | None
) -> None:
    """Write an ``.npz`` as ADM's evaluator reads it: ``arr_0`` uint8 [N, H, W, 3], then ``arr_1`` int64 [N] labels if
    any.

    The pictures are streamed: 50,000 of 256 x 256 are 9.8 GB.
    """

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for picture in pictures:
                    stream.write(np.ascontiguousarray(picture).tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w") as stream:
                    np.lib.format.write_array(stream, labels, allow_pickle=False)

    write_atomically(path, write)


def grid_rows(labels: Sequence[int], class_names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Rows of a grid of pictures: the name and the image numbers of each.

    One row for each label in ascending order, its first pictures; without labels (-1) as many rows as there are
    pictures for.
    """
    rows: dict[int, list[int]] = defaultdict(list)
    for image, label in enumerate(labels):
        row = image // GRID_COLUMNS if label < 0 else label
        if len(rows[row]) < GRID_COLUMNS:
            rows[row].append(image)
    named = []
    for row in sorted(rows)[:GRID_ROWS]:
        label = labels[rows[row][0]]
        named.append(("" if label < 0 else class_names[label] if label < len(class_names) else str(label), rows[row]))
    return named


def hide_after(picture: np.ndarray, grid: tuple[int, int], keep: int) -> np.ndarray:
    """uint8 [H, W, 3] with the patches of all but the first ``keep`` tokens, in raster order, in grey."""
    hidden = np.arange(grid[0] * grid[1]).reshape(grid) >= keep
    height, width = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    return np.where(hidden.repeat(height, 0).repeat(width, 1)[..., None], np.uint8(GREY), picture)


def draw_samples(
    labels: Sequence[int],
    class_names: Sequence[str],
    made: Callable[[int], np.ndarray],
    originals: Originals | None = None,
) -> Image.Image:
    """Rows of classes, in order; given pictures and, for a completion, what was kept of them stand above.

    ``made`` gives uint8 [H, W, 3] of an image number.
    """
    drawn = []
    for name, images in grid_rows(labels, class_names):
        row = [made(image) for image in images]
        if originals is None:
            drawn.append((name, row))
            continue
        given = [originals.picture(image) for image in images]
        drawn.append((f"{name} original".strip(), given))
        if originals.keep is not None:
            drawn.append(("kept", [hide_after(picture, originals.grid, originals.keep) for picture in given]))
        drawn.append(("reconstructed" if originals.keep is None else "completed", row))
        if len(drawn) >= GRID_ROWS:
            break
    return draw_grid(drawn)


def draw_grid(rows: Sequence[tuple[str, Sequence[np.ndarray]]], height: int = 64) -> Image.Image:
    """A picture of rows of pictures (uint8 [H, W, 3] of one size), each row with its label on the left.

    Pictures smaller than ``height`` are enlarged by a whole number without smoothing, so that pixels stay what they
    are.
    """
    scale = max(1, height // rows[0][1][0].shape[0])
    tall, wide = (side * scale for side in rows[0][1][0].shape[:2])
    font = ImageFont.load_default(size=16)
    gap = 2
    margin = max((int(font.getlength(label)) + 12 for label, _ in rows if label), default=0)
    columns = max(len(pictures) for _, pictures in rows)
    canvas = Image.new("RGB", (margin + columns * (wide + gap) + gap, len(rows) * (tall + gap) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (label, pictures) in enumerate(rows):
        top = gap + row * (tall + gap)
        pen.text((6, top + tall / 2), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((wide, tall), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + gap + column * (wide + gap), top))
    return canvas
