"""Members of a zip; their labels are in ``dataset.json`` where it has one (StyleGAN's and EDM's layout)."""

import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from digit_ds.data.images import SUFFIXES
from digit_ds.data.sources.protocol import ArchiveFile, Entry
from digit_ds.errors import UserError

_LOCAL_HEADER = 30
"""Bytes before a member's name; its length and that of the extra field stand at 26 and 28."""


def entries(files: Sequence[ArchiveFile], passed_over: Counter[str]) -> Iterator[Entry]:
    """The images of some zips.

    Raises:
        UserError: one is no zip, or a member is encrypted or compressed otherwise than by deflate.
    """
    for number, file in enumerate(files):
        try:
            with file.open("rb") as directory, zipfile.ZipFile(directory) as archive, file.open("rb") as stream:
                labels = _labels(file, archive)
                for member in archive.infolist():
                    path, suffix = member.filename, Path(member.filename).suffix.lower()
                    if member.is_dir() or path == "dataset.json" or any(p.startswith(".") for p in path.split("/")):
                        continue
                    if suffix not in SUFFIXES:
                        passed_over[suffix] += 1
                        continue
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                        raise UserError(f"{file}: {path} is encrypted or packed, expected stored or deflated images")
                    stream.seek(member.header_offset)
                    header = stream.read(_LOCAL_HEADER)
                    if header[:4] != b"PK\3\4":
                        raise UserError(
                            f"{file}: {path} is not at the offset that the zip directory names, expected a complete zip"
                        )
                    skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                    yield Entry(
                        path,
                        labels.get(path) if labels else None,
                        number,
                        member.header_offset + _LOCAL_HEADER + skip,
                        member.compress_size,
                        member.compress_type == zipfile.ZIP_DEFLATED,
                    )
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise UserError(f"{file}: cannot be read ({error}), expected a complete zip") from error


def _labels(file: ArchiveFile, archive: zipfile.ZipFile) -> dict[str, int] | None:
    if "dataset.json" not in archive.namelist():
        return None
    try:
        pairs = json.loads(archive.read("dataset.json"))["labels"]
        return None if pairs is None else {str(path): int(label) for path, label in pairs}
    except Exception as error:  # readers raise arbitrary exceptions on malformed files
        raise UserError(
            f"{file}: its dataset.json cannot be read ({error!r}), expected pairs of path and label under 'labels'"
        ) from error
