"""Files that are complete or not there, and hashes that name their content."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from digit_ds.errors import UserError

PASSING = re.compile(r"\..+\.\d+\.tmp(\.[^.]*)?")
"""Names of files that are being written, see ``_replace``."""


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` and move its result to ``path``: readers see the old file or the whole new one.

    The file gets the mode of the umask, whatever the writer sets. A folder that cannot be made or written
    to, or a full disk, raises ``UserError``.
    """
    path = Path(path)
    try:
        _replace(path, write)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def make_directory(path: Path) -> None:
    """Make a directory and those above it, unless it is there; a dangling link raises ``UserError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                raise UserError(
                    f"{place}: is a link to {place.readlink()}, which does not exist, expected a directory"
                ) from error
        raise


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    make_directory(path.parent)
    # The suffix is kept because writers such as numpy.save append their own when it is missing.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors gives its files 0600: colleagues could not read them
        write(temporary)
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode & 0o777)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):  # it must not hide why nothing could be written
            temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing or malformed one raises ``UserError``."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a JSON file") from error
    return parse_json(path, content)


def parse_json(place: Path | str, content: bytes) -> Any:
    """The value in the bytes of a JSON file, which ``place`` names; malformed ones are the user's error."""
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is not valid JSON ({error})") from error


def is_whole(value: Any, smallest: int, largest: int = 2**31 - 1) -> bool:
    """Whether a value read from JSON or YAML is a whole number in a range; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    try:
        with Path(path).open("rb") as stream:
            return (
                hashlib.file_digest(stream, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _sha256(stream)
            )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _sha256(stream: Any) -> str:
    """``hashlib.file_digest`` for Python 3.10."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
