"""The points to cluster: a features directory or one array, memory-mapped and read block by block."""

import hashlib
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from digit_ds.errors import UserError
from digit_ds.files import read_json, sha256
from digit_ds.safe_load import load_npy

# Blocks are fixed by the rows' numbers and not by the number of processes, so that all runs compute the same.
BLOCK_ROWS = 4096


class Points:
    """``count`` rows of ``width`` numbers in one or more ``.npy`` files, read as float32.

    With ``bf16`` the files hold the bits of bfloat16 numbers as uint16.

    Attributes: ``provenance`` (what the features' manifest says about the encoder; {} for an array), ``identity``
    (a hash that names the content), ``files`` [(path, sha256 or None)].
    """

    def __init__(
        self, files: list[tuple[Path, int | None, str | None]], provenance: dict[str, Any], bf16: bool = False
    ) -> None:
        self.files = [(path, digest) for path, _, digest in files]
        self.provenance = provenance
        self._bf16 = bf16
        self._sources = []  # (path, dtype, byte offset of the first row)
        self._starts = [0]
        width = None
        for path, rows, _ in files:
            array = _open(path, bf16)
            if rows is not None and rows != array.shape[0]:
                raise UserError(f"{path}: holds {array.shape[0]} rows, expected {rows} by manifest.json")
            if width is not None and array.shape[1] != width:
                raise UserError(f"{path}: rows are {array.shape[1]} wide, expected {width} as in {files[0][0]}")
            width = array.shape[1]
            self._sources.append((path, array.dtype, array.offset))
            self._starts.append(self._starts[-1] + array.shape[0])
        self.count = self._starts[-1]
        self.width = int(width or 0)

    @property
    def blocks(self) -> int:
        """Number of blocks of ``BLOCK_ROWS`` rows, the last one possibly shorter."""
        return -(-self.count // BLOCK_ROWS)

    def block(self, number: int) -> np.ndarray:
        """Block ``number`` as float32 [rows, width]."""
        start = number * BLOCK_ROWS
        return self.read(start, min(start + BLOCK_ROWS, self.count))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` as a float32 copy; the mapping is dropped, so that only the copy fills memory."""
        rows = np.empty((stop - start, self.width), np.float32)
        position = start
        while position < stop:
            file = bisect_right(self._starts, position) - 1
            end = min(stop, self._starts[file + 1])
            path, dtype, offset = self._sources[file]
            skipped = (position - self._starts[file]) * self.width * dtype.itemsize
            try:
                stored: np.ndarray = np.memmap(path, dtype, "r", offset + skipped, (end - position, self.width))
                if self._bf16:  # the upper half of a float32
                    stored = (stored.astype(np.uint32) << 16).view(np.float32)
                rows[position - start : end - start] = stored
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path}: cannot be read ({error}), expected the array that it was when the job started"
                ) from error
            position = end
        return rows

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows with these numbers, in this order, as float32."""
        taken = np.empty((len(numbers), self.width), np.float32)
        for place, number in enumerate(numbers):
            taken[place] = self.read(int(number), int(number) + 1)[0]
        return taken

    def describe(self, block: int, row: int) -> str:
        """Where row ``row`` of block ``block`` is, for an error message."""
        number = block * BLOCK_ROWS + row
        file = bisect_right(self._starts, number) - 1
        return f"{self._sources[file][0]}: row {number - self._starts[file]}"

    def identity(self) -> str:
        """A hash of the content: of the manifest's file hashes, or of the array file itself."""
        described = [(digest or sha256(path), count) for (path, digest), count in zip(self.files, self._starts[1:])]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def open_points(path: Path | str) -> Points:
    """Open a FEATURES_DIR (manifest.json and chunk files) or an ARRAY.npy of shape [points, width]."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist, expected a features directory or a .npy array")
    if path.is_file():
        return Points([(path, None, None)], {})
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: has no manifest.json, expected the output folder of digit-ds features")
    manifest = read_json(path / "manifest.json")
    try:
        if manifest["format"] != 1:
            raise UserError(f"{path / 'manifest.json'}: format is {manifest['format']!r}, expected 1")
        files = [(path / Path(chunk["file"]).name, int(chunk["rows"]), chunk["sha256"]) for chunk in manifest["chunks"]]
        bf16 = manifest["dtype"] == "bf16"
        points = Points([file for file in files if file[1]], dict(manifest["provenance"]), bf16)
        expected = (int(manifest["count"]), int(manifest["width"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'manifest.json'}: is wrong ({error!r}), expected the manifest of digit-ds features"
        ) from error
    if points.count and (points.count, points.width) != expected:
        raise UserError(
            f"{path}: holds {points.count} points of width {points.width}, expected {expected[0]} of width "
            f"{expected[1]} by manifest.json"
        )
    return points


def _open(path: Path, bf16: bool) -> np.memmap:
    """Map a two-dimensional floating-point ``.npy`` file, or one of the bits of bfloat16 numbers."""
    array = load_npy(path, "a .npy array", mmap=True)
    mapped = isinstance(array, np.memmap) and array.ndim == 2
    numbers = mapped and (array.dtype == np.uint16 if bf16 else array.dtype.kind == "f" and array.dtype.itemsize <= 8)
    if not numbers:
        found = f"{array.dtype} {list(array.shape)}"
        expected = "the bits of bfloat16 numbers in uint16" if bf16 else "floating-point numbers"
        raise UserError(f"{path}: holds {found}, expected {expected} [points, width]")
    if not array.flags.c_contiguous:
        raise UserError(f"{path}: is stored column by column (Fortran order), expected row by row")
    assert isinstance(array, np.memmap)
    return array
