"""What every source of images offers, and what an archive says of each of its members."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol


class ImageSource(Protocol):
    """Images by name. A name is ``class/file`` or, without a class, ``file``; it decides order, crops and label.

    The same pictures give the same names, hence the same features and tokens, whatever they are kept in.
    """

    @property
    def root(self) -> Path | str:
        """The folder, file or address, for messages."""

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the labels where the source says it, known after ``names``; None: it does not."""

    def names(self, passed_over: Counter[str]) -> Iterator[str]:
        """All names, sorted as strings; files that are no images are counted by suffix. Called on one process."""

    def read(self, name: str) -> bytes:
        """The encoded picture; safe to call in forked processes.

        Raises:
            UnreadableImageError: it cannot be read.
        """


class ArchiveFile(Protocol):
    """What archives are read through: a ``Path``, or an object of a store that looks like one."""

    @property
    def name(self) -> str:
        """Last part of the path."""

    @property
    def stem(self) -> str:
        """``name`` without its last suffix."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """The bytes from the beginning."""

    def stat(self) -> Any:
        """``st_size`` and ``st_mtime_ns``."""


class Entry(NamedTuple):
    """A picture in an archive, before it has its name."""

    path: str
    """Its path there; with a label of its own, folders that are not classes become part of the file's name."""
    label: int | None
    """Its label where the archive has one."""
    archive: int
    """Number of the file that holds it."""
    offset: int
    """First byte in that file; in parquet where the bytes lie there packed, -1 - the row group."""
    length: int
    """Bytes; beside a row group the row in it."""
    deflated: bool = False
    """Whether the bytes are compressed as in a zip."""
