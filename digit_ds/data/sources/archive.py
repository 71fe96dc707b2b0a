"""Images inside tars or a zip, read by offset."""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from digit_ds.data.images import UnreadableImageError
from digit_ds.data.sources.index import Index
from digit_ds.data.sources.labels import Labels
from digit_ds.data.sources.protocol import ArchiveFile, Entry
from digit_ds.data.sources.remote import RemoteFile

LONGEST = 1 << 30
"""Bytes to which a compressed member may grow."""


class Bytes:
    """Parts of some files, by offset; each process opens them for itself."""

    def __init__(self, files: Sequence[ArchiveFile]) -> None:
        self._files = files
        self._descriptors: dict[tuple[int, int], int] = {}

    def read(self, number: int, length: int, offset: int) -> bytes:
        """``length`` bytes of a file from ``offset`` on.

        Raises:
            UnreadableImageError: they are not there.
        """
        file = self._files[number]
        try:
            data = file.read_at(length, offset) if isinstance(file, RemoteFile) else self._local(number, length, offset)
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error
        if len(data) != length:
            raise UnreadableImageError(f"{file.name} ends inside it")
        return data

    def _local(self, number: int, length: int, offset: int) -> bytes:
        key = (os.getpid(), number)
        if key not in self._descriptors:
            self._descriptors[key] = os.open(str(self._files[number]), os.O_RDONLY)
        return os.pread(self._descriptors[key], length, offset)


class ArchiveSource:
    """The members that ``entries`` finds; see :class:`~digit_ds.data.sources.protocol.ImageSource`."""

    def __init__(
        self,
        root: Path | str,
        files: Sequence[ArchiveFile],
        index: Path,
        labels: Labels | None,
        entries: Callable[[Sequence[ArchiveFile], Counter[str]], Iterator[Entry]],
    ) -> None:
        self.root, self._files, self._entries = root, files, entries
        self._index = Index(index, files, labels)
        self._bytes = Bytes(files)

    @property
    def classes(self) -> list[str] | None:
        """Class names by the archive's own labels."""
        return self._index.classes

    def names(self, passed_over: Counter[str]) -> Iterator[str]:
        """Sorted names, from the index, which is built where it is missing."""
        self._index.build(lambda: self._entries(self._files, passed_over), lambda: None)
        return self._index.names()

    def read(self, name: str) -> bytes:
        """The member's bytes."""
        place = self._index.place(name)
        if place is None:
            raise UnreadableImageError("not in the archive")
        data = self._bytes.read(place.archive, place.length, place.offset)
        if not place.deflated:
            return data
        try:
            return zlib.decompressobj(-15).decompress(data, LONGEST)
        except zlib.error as error:
            raise UnreadableImageError(str(error)) from error
