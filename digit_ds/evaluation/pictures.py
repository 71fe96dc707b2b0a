"""Sets of pictures to score: a folder or an ``.npz``, prepared like the reference, and hashed by content."""

import hashlib
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from digit_ds.data.images import UnreadableImageError, decode
from digit_ds.data.sources.opening import list_source, open_source
from digit_ds.data.sources.remote import is_remote
from digit_ds.errors import UserError
from digit_ds.evaluation.settings import Preparation
from digit_ds.files import read_json
from digit_ds.safe_load import load_npz


class Pictures(Protocol):
    """What torch-fidelity is given, and what names it."""

    name: str

    @property
    def content_hash(self) -> str:
        """Names the pixels."""

    sides: tuple[int, int]
    """Height and width of every picture."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [3, H, W]."""


class Folder(Dataset):
    """All pictures of a folder or of archives (``data.sources``), sorted; all of one size."""

    def __init__(self, root: Path | str, preparation: Preparation = "none", size: int | None = None):
        if preparation != "none" and size is None:
            raise UserError(
                f"{root}: preparation is {preparation!r}, but size is not given, expected both (--preparation, --size)"
            )
        self._source = open_source(root)
        self.root, self.preparation, self.size = self._source.root, preparation, size
        self.files = list_source(self._source)
        self.sides: tuple[int, int] = (
            self._read(0).size[::-1] if size is None or preparation == "none" else (size, size)
        )
        self.name = f"{root}" if preparation == "none" else f"{root} ({preparation} preparation, {size} pixels)"

    @property
    def content_hash(self) -> str:
        """SHA-256 over names, file contents and preparation."""
        digest = hashlib.sha256(f"{self.preparation} {self.size}".encode())
        for file in self.files:
            digest.update(file.encode("utf-8", "surrogateescape"))
            digest.update(hashlib.sha256(self._read_bytes(file)).digest())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def _read_bytes(self, name: str) -> bytes:
        try:
            return self._source.read(name)
        except UnreadableImageError as error:
            raise UserError(f"{self.root}/{name}: cannot be read ({error})") from error

    def _read(self, index: int) -> Image.Image:
        try:
            return decode(self._source.read(self.files[index]))
        except UnreadableImageError as error:
            raise UserError(f"{self.root}/{self.files[index]}: is not a readable image ({error})") from error

    def __getitem__(self, index: int) -> Tensor:
        image = self._read(index)
        if self.size is not None and self.preparation != "none":
            image = prepare(image, self.preparation, self.size)
        if (found := image.size[::-1]) != self.sides:
            raise UserError(
                f"{self.root}/{self.files[index]}: has {describe_sides(found)} pixels and {self.files[0]} "
                f"{describe_sides(self.sides)}, expected pictures of one size, or a reference with --preparation and "
                "--size"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Array(Dataset):
    """Pictures uint8 [N, H, W, 3] in memory."""

    def __init__(self, pictures: np.ndarray, name: str):
        self.pictures, self.name, self.sides = pictures, name, pictures.shape[1:3]

    @property
    def content_hash(self) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self.pictures.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.pictures[index].copy()).permute(2, 0, 1)


class Statistics:
    """Saved mean and covariance of a reference's features: ``mu`` [F] and ``sigma`` [F, F] of an ``.npz``.

    ``network`` names what computed them, ``reference`` what of; None in files of others, who do not say.
    """

    def __init__(self, path: Path | str, network: str | None, reference: str | None):
        self.name, self.network, self.reference = str(path), network, reference
        self.mean, self.covariance = _array(Path(path), "mu"), _array(Path(path), "sigma")


def open_pictures(
    path: Path | str, preparation: Preparation = "none", size: int | None = None
) -> Pictures | Statistics:
    """Whatever ``path`` is: a folder, a sampling job's folder, an ``.npz`` of pictures or one of statistics.

    Raises:
        UserError: it is none of them, or holds fewer than two pictures, which have no covariance.
    """
    if is_remote(path):
        return _at_least_two(Folder(path, preparation, size))
    path = Path(path)
    if path.is_dir():
        pictures = _job(path, preparation, size) if _is_job(path) else Folder(path, preparation, size)
        return _at_least_two(pictures)
    if path.suffix in (".parquet", ".tar", ".zip"):  # a pattern of such files, too
        return _at_least_two(Folder(path, preparation, size))
    if path.suffix != ".npz":
        raise UserError(f"{path}: is no folder, expected a folder of images or an .npz, .parquet, .tar or .zip file")
    if preparation != "none":
        raise UserError(f"{path}: is an .npz file, expected a folder of images for preparation {preparation!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except Exception as error:  # BadZipFile, OSError, and of damaged directories also others
        raise UserError(f"{path}: cannot be read ({error}), expected an .npz file") from error
    if "arr_0.npy" in names:
        return _at_least_two(_adm_array(path))
    if {"mu.npy", "sigma.npy"} <= names:
        said = {name: str(_array(path, name)) for name in ("network", "reference") if f"{name}.npy" in names}
        return Statistics(path, said.get("network"), said.get("reference"))
    raise UserError(f"{path}: holds {', '.join(sorted(names))}, expected arr_0 (pictures) or mu and sigma (statistics)")


def describe_sides(sides: tuple[int, int]) -> str:
    """Height and width as ``WIDTH x HEIGHT``."""
    return f"{sides[1]} x {sides[0]}"


def _is_job(path: Path) -> bool:
    """Whether a folder is a sampling job's: ``images/``, and beside it a manifest that counts them."""
    return (path / "images").is_dir() and (path / "manifest.json").is_file()


def _job(path: Path, preparation: Preparation, size: int | None) -> Folder:
    """The pictures of a complete sampling job; its grid is none of them."""
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("count"), int):
        raise UserError(f"{path / 'manifest.json'}: has no 'count', expected the manifest of a sampling job")
    if not manifest.get("complete"):
        raise UserError(f"{path}: is a sampling job that is not complete, expected its command to be run to the end")
    pictures = Folder(path / "images", preparation, size)
    if len(pictures) != manifest["count"]:
        raise UserError(
            f"{path / 'images'}: holds {len(pictures)} pictures, expected the {manifest['count']} of its manifest.json"
        )
    return pictures


def _at_least_two(pictures: Pictures) -> Pictures:
    if len(pictures) < 2:
        raise UserError(f"{pictures.name}: holds {len(pictures)} picture(s), expected at least 2")
    return pictures


def prepare(image: Image.Image, preparation: Preparation, size: int) -> Image.Image:
    """Resize the short side to ``size`` and crop the centre (see ``Preparation``)."""
    if preparation == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        sides = (round(image.width * scale), round(image.height * scale))
    else:
        short = min(image.size)
        sides = (int(size * image.width / short), int(size * image.height / short))
    image = image.resize(sides, Image.Resampling.BICUBIC)
    if preparation == "adm":
        left, top = (image.width - size) // 2, (image.height - size) // 2
    else:
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _adm_array(path: Path) -> Array:
    """``arr_0`` uint8 [N, H, W, 3] of an ``.npz`` in ADM's layout."""
    pictures = _array(path, "arr_0")
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise UserError(f"{path}: arr_0 is {pictures.dtype} {list(pictures.shape)}, expected uint8 [N, H, W, 3]")
    return Array(pictures, str(path))


def _array(path: Path, name: str) -> np.ndarray:
    return load_npz(path, name)[name]
