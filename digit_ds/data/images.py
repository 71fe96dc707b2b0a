"""Image folders, decoding, and the views that are cut from an image.

An image is named by its POSIX path relative to the folder. Everything random about it (crops, flips, which patches are
kept) is drawn from a seed, that name and the number of the view, never from the process that happens to work on it.
"""

import hashlib
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps

from digit_ds.errors import UserError

SUFFIXES = frozenset(
    f".{name}"
    for name in ("bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp")
)
"""Files that are taken for images, in lower case; whether they are is found out by decoding them."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are decoded. Pillow chooses by content, and some of its other formats start
programs (EPS: Ghostscript) or have decoders that are rarely tested."""

CropKind = Literal["training", "random", "ten-crop", "random-resized-crop"]
"""``training``: the centre crop, then random crops with flips; ``random``: random crops with flips from the first view
on; ``ten-crop``: four corners and the centre, then their mirror images; ``random-resized-crop``: a random part of the
image, 8 to 100 % of its area, scaled to size and flipped at random."""

STRETCHED = 16
"""From this ratio of the sides on, only the wanted part of an image is resized: 10,000 x 20 pixels would become
128,000 x 256."""


def walk(root: Path | str, passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Names of the image files below ``root``, sorted as strings, one directory in memory at a time.

    Hidden files and folders are left out; symbolic links are followed unless they lead back to a folder above. A link
    to nothing counts as an image, so that it is reported when it cannot be read. Files of other suffixes are counted
    in ``passed_over`` by suffix.

    Raises:
        UserError: ``root`` is not a folder, or a folder cannot be listed.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: is not a folder, expected a folder of images")
    yield from _walk(str(root), "", (_inode(str(root)),), Counter() if passed_over is None else passed_over)


def no_images(root: Path | str, passed_over: Counter[str]) -> UserError:
    """The error of a folder without images."""
    others = f" ({describe_passed_over(passed_over)})" if passed_over else ""
    return UserError(f"{root}: holds no images{others}, expected files such as .jpg or .png")


def warn_of_passed_over(root: Path | str, passed_over: Counter[str]) -> None:
    """Warn on stderr how many files of which suffixes were not taken for images."""
    if passed_over:
        print(f"warning: {root}: {describe_passed_over(passed_over)}", file=sys.stderr, flush=True)


def describe_passed_over(passed_over: Counter[str]) -> str:
    """``ignored 12 files: 10 .avif, 2 .heic``."""
    by_count = sorted(passed_over.items(), key=lambda item: (-item[1], not item[0], item[0]))
    kinds = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in by_count[:5]]
    if rest := sum(count for _, count in by_count[5:]):
        kinds.append(f"{rest:,} others")
    return f"ignored {passed_over.total():,} files: {', '.join(kinds)}"


def _inode(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 (strings: millions of Path objects cost more than the listing)
    return status.st_dev, status.st_ino


def _walk(directory: str, prefix: str, above: tuple[tuple[int, int], ...], passed_over: Counter[str]) -> Iterator[str]:
    """Names below ``directory``; ``above`` are the inodes of the folders that contain it and of itself."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{directory}: cannot be listed ({error.strerror})") from error
    found = [(name, is_folder) for name, is_folder in found if is_folder is not None]
    # A folder sorts as "name/", which makes the depth-first order that of the complete names.
    for name, is_folder in sorted(found, key=lambda entry: entry[0] + "/" * bool(entry[1])):
        if is_folder:
            path = f"{directory}/{name}"
            inode = _inode(path)
            if inode not in above:
                yield from _walk(path, f"{prefix}{name}/", (*above, inode), passed_over)
        elif (suffix := os.path.splitext(name)[1].lower()) in SUFFIXES:  # noqa: PTH122
            yield prefix + name
        else:
            passed_over[suffix] += 1


def _is_folder(entry: os.DirEntry) -> bool | None:
    """Whether a directory entry is a folder or, perhaps, an image; None for pipes, sockets and devices."""
    try:
        return True if entry.is_dir() else False if entry.is_file() or entry.is_symlink() else None
    except OSError:  # a symbolic link to itself
        return False


def class_name(identity: str) -> str | None:
    """The first-level folder of an image, None for an image that lies in no folder."""
    folder, separator, _ = identity.partition("/")
    return folder if separator else None


class UnreadableImageError(Exception):
    """A file that cannot be decoded; the message is a short reason without the file's name."""


def open_image(source: Path | str | BinaryIO) -> Image.Image:
    """``Image.open`` for :data:`FORMATS` alone; pixels are decoded when they are asked for."""
    return Image.open(source, formats=FORMATS)


def decode(source: Path | str | bytes) -> Image.Image:
    """Decode the first frame of an image file, or of its content as bytes, to upright 8-bit RGB.

    EXIF orientation is applied; greyscale and CMYK are converted; what is transparent becomes white; 16-bit greys keep
    their high byte.

    Raises:
        UnreadableImageError: the file is no image, is cut short, or cannot be converted.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images and odd metadata: what cannot be used raises
            with open_image(BytesIO(source) if isinstance(source, bytes) else source) as image:
                image.load()
                return upright_rgb(image)
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise arbitrary exceptions on malformed files
        raise UnreadableImageError(_reason(source, error)) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """What :func:`decode` makes of a picture that is open already.

    Raises:
        UnreadableImageError: it has 32-bit or floating-point grey values.
    """
    return _rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged metadata count as none."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        if grey.max() > 255:
            raise UnreadableImageError("32-bit grey values")
        return Image.fromarray(grey.astype(np.uint8), "L").convert("RGB")
    if image.mode == "F":
        raise UnreadableImageError("floating-point grey values")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _reason(source: Path | str | bytes, error: Exception) -> str:
    """A short reason that does not depend on where the file lies."""
    if isinstance(error, Image.UnidentifiedImageError):
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return f"not an image (begins with {content[:12]!r})" if content else "empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" or type(error).__name__


def uniforms(count: int, *source: object) -> np.ndarray:
    """``count`` numbers in [0, 1) that depend on ``source`` alone (a seed, a name, ...), the same on every machine."""
    key = "\0".join(map(str, source)).encode("utf-8", "surrogateescape")
    digests = (
        hashlib.blake2b(key, salt=number.to_bytes(8, "little")).digest() for number in range(math.ceil(count / 8))
    )
    return (np.frombuffer(b"".join(digests), "<u8")[:count] >> np.uint64(11)) * 2.0**-53


class Cut(NamedTuple):
    """One view of an image: the part ``box`` (left, top, right, bottom), scaled to size, perhaps mirrored."""

    box: tuple[float, float, float, float]
    mirrored: bool


@dataclass(frozen=True)
class Crops:
    """How views are cut from images: which, of what size, and the seed of what is random.

    ``size`` is the side of a view in pixels; ``resize`` the length to which an image's short side is scaled first
    (bicubic with antialiasing), not used by ``random-resized-crop``. Without ``flips`` random views are never mirrored.
    """

    kind: CropKind
    size: int
    resize: int
    views: int
    seed: int
    flips: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(CropKind):
            raise UserError(f"crops is {self.kind!r}, expected one of {', '.join(get_args(CropKind))}")
        if self.kind == "ten-crop" and self.views != 10:
            raise UserError(f"views is {self.views}, expected 10 with ten-crop")
        if self.views < 1:
            raise UserError(f"views is {self.views}, expected at least 1")
        if self.resize < self.size:
            raise UserError(f"resize is {self.resize}, expected at least the image size {self.size}")

    def cut(self, image: Image.Image, identity: str) -> np.ndarray:
        """All views of a decoded image: uint8 [views, size, size, 3]."""
        whole, scale = image, 1.0
        if self.kind != "random-resized-crop":
            short, long = sorted(image.size)
            scale = self.resize / short
            if long < STRETCHED * short:
                whole = image.resize(self._resized(image.size), Image.Resampling.BICUBIC)
                scale = 1.0
        views = np.empty((self.views, self.size, self.size, 3), np.uint8)
        for view in range(self.views):
            box, mirrored = self.plan(image.size, identity, view)
            if whole is not image:
                left, top, right, bottom = map(int, box)
                part = whole.crop((left, top, right, bottom))
            else:
                x0, y0, x1, y1 = (min(edge / scale, image.size[axis % 2]) for axis, edge in enumerate(box))
                part = image.resize((self.size, self.size), Image.Resampling.BICUBIC, (x0, y0, x1, y1))
            pixels = np.asarray(part)
            views[view] = pixels[:, ::-1] if mirrored else pixels
        return views

    def plan(self, image_size: tuple[int, int], identity: str, view: int) -> Cut:
        """Where view ``view`` lies: in the resized image, or for ``random-resized-crop`` in the image itself."""
        if self.kind == "random-resized-crop":
            return self._random_resized(image_size, identity, view)
        width, height = self._resized(image_size)
        room_x, room_y = width - self.size, height - self.size
        centre = (round(room_x / 2), round(room_y / 2))
        if self.kind == "ten-crop":
            corners = [(0, 0), (room_x, 0), (0, room_y), (room_x, room_y), centre]
            (left, top), mirrored = corners[view % 5], view >= 5
        elif self.kind == "training" and view == 0:
            (left, top), mirrored = centre, False
        else:
            u = uniforms(3, self.seed, identity, view, self.kind)
            left, top, mirrored = int(u[0] * (room_x + 1)), int(u[1] * (room_y + 1)), self.flips and bool(u[2] < 0.5)
        return Cut((left, top, left + self.size, top + self.size), mirrored)

    def windows(self, image_size: tuple[int, int], identity: str) -> np.ndarray:
        """All views as windows on the image itself: float32 [views, 5] of left, width, top, height, mirrored.

        Width and height are those of the part of the image that one pixel of the view covers.
        """
        # PIL samples each axis with the ratio of the rounded sides.
        resized = image_size if self.kind == "random-resized-crop" else self._resized(image_size)
        x, y = image_size[0] / resized[0], image_size[1] / resized[1]
        windows = np.empty((self.views, 5), np.float32)
        for view in range(self.views):
            (left, top, right, bottom), mirrored = self.plan(image_size, identity, view)
            windows[view] = left * x, (right - left) * x / self.size, top * y, (bottom - top) * y / self.size, mirrored
        return windows

    def _resized(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Width and height once the short side is ``resize``; the long side is rounded down, as torchvision does."""
        short = min(image_size)
        width, height = (int(self.resize * side / short) for side in image_size)
        return width, height

    def _random_resized(self, image_size: tuple[int, int], identity: str, view: int) -> Cut:
        """A part of 8 to 100 % of the area with sides 3:4 to 4:3, as torchvision's transform of that name draws it."""
        width, height = image_size
        u = uniforms(41, self.seed, identity, view, self.kind)
        mirrored = self.flips and bool(u[40] < 0.5)
        for area, ratio, x, y in u[:40].reshape(10, 4):
            target = width * height * (0.08 + 0.92 * area)
            aspect = math.exp(math.log(3 / 4) + ratio * math.log(16 / 9))
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return Cut((left, top, left + w, top + h), mirrored)
        w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
        left, top = (width - w) // 2, (height - h) // 2
        return Cut((left, top, left + w, top + h), mirrored)
