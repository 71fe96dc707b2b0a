"""Members of tars: class folders, WebDataset's samples, and ImageNet's tar of tars.

A member that is a tar itself holds the class of its name (``n01440764.tar``). In WebDataset's layout the members of a
sample share the path up to the first dot of the file's name; ``cls`` holds the label, or ``json`` under ``label`` or
``cls``.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from digit_ds.data.images import SUFFIXES
from digit_ds.data.sources.protocol import ArchiveFile, Entry
from digit_ds.errors import UserError


def entries(files: Sequence[ArchiveFile], passed_over: Counter[str]) -> Iterator[Entry]:
    """The images of some tars.

    Raises:
        UserError: one is no tar, is compressed, or is cut short.
    """
    for number, file in enumerate(files):
        with file.open("rb") as stream:
            yield from _samples(file, number, stream, "", passed_over)


def _samples(
    file: ArchiveFile, number: int, stream: BinaryIO, folder: str, passed_over: Counter[str]
) -> Iterator[Entry]:
    """The images of the tar that begins where ``stream`` stands."""
    key, label = "", None  # of the sample that is being collected
    images: list[Entry] = []
    for member in _members(file, stream):
        path = folder + member.name.removeprefix("./")
        if any(part.startswith(".") and part != ".." for part in path.split("/")):
            continue
        above, slash, base = path.rpartition("/")
        stem, _, suffix = base.partition(".")
        if above + slash + stem != key:
            yield from (image._replace(label=label) for image in images)
            key, images, label = above + slash + stem, [], None
        last = base.rpartition(".")[2].lower()
        if last == "tar" and not folder:
            stream.seek(member.offset_data)
            yield from _samples(file, number, stream, f"{path[:-4]}/", passed_over)
        elif f".{last}" in SUFFIXES:
            images.append(Entry(path, None, number, member.offset_data, member.size))
        elif suffix in ("cls", "json") and member.size < 1 << 20:
            stream.seek(member.offset_data)
            found = _label(file, path, suffix, stream.read(member.size))
            label = label if found is None else found
        else:
            passed_over[f".{last}" if "." in base else ""] += 1
    yield from (image._replace(label=label) for image in images)


def _members(file: ArchiveFile, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it keeps them all
                if member.isreg():
                    yield member
            stream.seek(tar.offset)
            if not stream.read(1):
                raise UserError(f"{file}: ends without the end-of-archive marker, expected a complete tar")
    except tarfile.TarError as error:
        compressed = file.open("rb").read(2) == b"\x1f\x8b"
        expected = "an uncompressed tar, whose members can be read in place" if compressed else "a complete tar"
        raise UserError(f"{file}: cannot be read ({error}), expected {expected}") from error


def _label(file: ArchiveFile, path: str, kind: str, data: bytes) -> int | None:
    try:
        if kind == "cls":
            return int(data)
        value = json.loads(data)
        found = value.get("label", value.get("cls")) if isinstance(value, dict) else None
        return None if found is None else int(found)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: {path} holds {data[:20]!r}, expected the number of a class") from error
