"""Which source a path is."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from digit_ds.data.images import no_images, walk, warn_of_passed_over
from digit_ds.data.sources import tars, zips
from digit_ds.data.sources.archive import ArchiveSource
from digit_ds.data.sources.folder import FolderSource
from digit_ds.data.sources.labels import Labels
from digit_ds.data.sources.parquet import ParquetSource
from digit_ds.data.sources.passing_index import passing_index
from digit_ds.data.sources.protocol import ArchiveFile, ImageSource
from digit_ds.data.sources.remote import is_remote, list_files
from digit_ds.errors import UserError

SPLITS = ("test", "train", "val", "validation")
EXPECTED = "expected a folder of images, or parquet, tar or zip files"


def open_source(path: Path | str, index: Path | None = None, labels: Path | str | None = None) -> ImageSource:
    """The images of a folder, or of one archive or a folder of archives; nothing is listed yet.

    Args:
        path: a folder, a ``.parquet``, ``.tar`` or ``.zip`` file, a folder (perhaps its ``data/``) of parquet files or
            tars, a pattern of such files (``DIR/train-*.parquet``), or an address ``s3://BUCKET/KEY`` of archives.
        index: file for the members' places, where ``path`` is no folder of images; None: one that is removed with
            the process.
        labels: file of classes by file name, for images without class folders (see ``labels``).

    Raises:
        UserError: it is none of them.
    """
    known = None if labels is None else Labels(labels)
    if is_remote(path):
        return _open_remote(str(path), index, known)
    path = Path(path)
    if "*" in path.name:
        files, kind = sorted(path.parent.glob(path.name)), path.suffix[1:].lower()
        if not files or kind not in ("parquet", "tar", "zip"):
            raise UserError(f"{path}: matches {len(files)} files, expected some that end in .parquet, .tar or .zip")
        return _open(path, kind, files, index, known)
    if path.is_dir() and next(walk(path), None) is None:
        for kind in ("parquet", "tar"):
            if files := sorted(path.glob(f"*.{kind}")) or sorted(path.glob(f"data/*.{kind}")):
                return _open(path, kind, files, index, known)
    if path.is_dir():
        return FolderSource(path, known)
    kind = path.suffix[1:].lower()
    if not path.is_file() or kind not in ("parquet", "tar", "zip"):
        raise UserError(f"{path}: is not a folder{'' if path.is_file() else ' or a file'}, {EXPECTED}")
    return _open(path, kind, [path], index, known)


def _open_remote(address: str, index: Path | None, labels: Labels | None) -> ImageSource:
    found = list_files(address)
    for kind in ("parquet", "tar", "zip"):
        if files := [file for file in found if file.suffix.lower() == f".{kind}"]:
            return _open(address, kind, files, index, labels)
    raise UserError(f"{address}: holds {len(found)} objects, none of them .parquet, .tar or .zip, {EXPECTED}")


def _open(
    root: Path | str, kind: str, files: Sequence[ArchiveFile], index: Path | None, labels: Labels | None
) -> ImageSource:
    splits = sorted({part for file in files for part in re.split("[-_.]", file.stem)} & {*SPLITS})
    if len(splits) > 1:
        raise UserError(f"{root}: holds the splits {' and '.join(splits)}, expected one, such as 'DIR/train-*.{kind}'")
    index = index or passing_index()
    if kind == "parquet":
        if labels is not None:
            raise UserError(f"{root}: has labels of its own, expected no --labels file with parquet")
        return ParquetSource(root, files, index)
    return ArchiveSource(root, files, index, labels, tars.entries if kind == "tar" else zips.entries)


def list_source(source: ImageSource, passed_over: Counter[str] | None = None) -> list[str]:
    """All names in memory.

    Args:
        source: as ``open_source`` gives it.
        passed_over: gets the number of ignored files by suffix; None: a warning on stderr gives it.

    Raises:
        UserError: there are none.
    """
    ignored: Counter[str] = Counter() if passed_over is None else passed_over
    names = list(source.names(ignored))
    if not names:
        raise no_images(source.root, ignored)
    if passed_over is None:
        warn_of_passed_over(source.root, ignored)
    return names
