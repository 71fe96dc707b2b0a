"""Where published files come from: the hub's repository, or a folder that they were copied to."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple, Protocol

from digit_ds import hub
from digit_ds.errors import UserError
from digit_ds.files import sha256


class File(NamedTuple):
    """What is known of a file before it is read."""

    size: int | None
    sha256: str | None


class Origin(Protocol):
    """A source of files by their paths in it."""

    name: str
    """How messages call it."""
    files: dict[str, File]
    """All its files."""

    def bring(self, path: str) -> Path:
        """The file on this machine, complete and compared with what is known of it."""


class Repository:
    """A model repository at one commit; files come to ``staging``, where an interrupted download continues.

    Raises:
        UserError: it cannot be reached.
    """

    def __init__(self, repository: str, staging: Path):
        import huggingface_hub

        self.name, self._staging = repository, staging
        with hub.errors(repository):
            found = huggingface_hub.HfApi().model_info(repository, files_metadata=True)
        self._commit = found.sha
        self.files = {
            file.rfilename: File(file.size, None if file.lfs is None else file.lfs.sha256)
            for file in found.siblings or ()
        }

    def bring(self, path: str) -> Path:
        """Download a file. One that is damaged is removed, so that the next call downloads it again."""
        import huggingface_hub

        name, expected = f"{self.name}/{path}", self.files[path]
        room = shutil.disk_usage(_existing(self._staging)).free + _size(self._staging)
        if expected.size is not None and expected.size > room:
            raise UserError(
                f"{self._staging}: has {room / 1e6:.1f} MB of room, expected {expected.size / 1e6:.1f} MB for {name}"
            )
        with hub.errors(name, self._staging):
            local = Path(
                huggingface_hub.hf_hub_download(self.name, path, revision=self._commit, local_dir=self._staging)
            )
        try:
            check(local, expected, name)
        except UserError:
            local.unlink()
            raise
        return local


class Folder:
    """A folder of copied files, which stay as they are; also a snapshot in the hub client's cache.

    Raises:
        UserError: it does not exist.
    """

    def __init__(self, root: Path | str):
        self._root, self.name = Path(root), str(root)
        if not self._root.is_dir():
            raise UserError(f"{root}: does not exist, expected a folder of copied files")
        found = (path for path in sorted(self._root.rglob("*")) if path.is_file())
        self.files = {
            path.relative_to(self._root).as_posix(): File(None, self._recorded_sha256(path))
            for path in found
            if not path.relative_to(self._root).parts[0].startswith(".")
        }

    def bring(self, path: str) -> Path:
        """The file where it lies."""
        local = self._root / path
        check(local, self.files[path], str(local))
        return local

    def _recorded_sha256(self, path: Path) -> str | None:
        """What the hub's client noted of a file: its cache names files by hash, a download to a folder leaves notes."""
        if re.fullmatch(r"[0-9a-f]{64}", path.resolve().name):
            return path.resolve().name
        note = self._root / ".cache" / "huggingface" / "download" / f"{path.relative_to(self._root)}.metadata"
        try:
            tag = note.read_text(encoding="utf-8").splitlines()[1]
        except (OSError, IndexError, UnicodeDecodeError):
            return None
        return tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None


def check(path: Path, expected: File, name: str) -> None:
    """Compare a file with what is known of it.

    Raises:
        UserError: size or content differs.
    """
    if expected.size is not None and (found := path.stat().st_size) != expected.size:
        raise UserError(f"{name}: has {found} bytes, expected {expected.size}")
    if expected.sha256 is not None and (content := sha256(path)) != expected.sha256:
        raise UserError(f"{name}: is damaged, its SHA-256 is {content}, expected {expected.sha256}")


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
