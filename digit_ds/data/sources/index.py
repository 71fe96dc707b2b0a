"""Where each member of the archives lies: built once, kept in one SQLite file, looked up by name.

The file is replaced when size or modification time of an archive, or the labels, differ from its stamp.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from digit_ds.data.images import class_name
from digit_ds.data.sources.labels import Labels
from digit_ds.data.sources.protocol import ArchiveFile, Entry
from digit_ds.errors import UserError
from digit_ds.files import write_atomically

FORMAT = 2
"""Of the stamp; 1 had the row groups of parquet files as offsets."""


class Place(NamedTuple):
    """Where the bytes of one image are; see :class:`~digit_ds.data.sources.protocol.Entry`."""

    archive: int
    offset: int
    length: int
    deflated: bool


class Index:
    """The names and places of all images of some archives, in the file ``path``."""

    def __init__(self, path: Path, files: Sequence[ArchiveFile], labels: Labels | None) -> None:
        self.path, self._files, self._labels = path, files, labels
        self._connection: sqlite3.Connection | None = None
        self._process = 0

    def build(self, entries: Callable[[], Iterable[Entry]], class_names: Callable[[], list[str] | None]) -> None:
        """Write the index unless it is there and of these very files.

        Raises:
            UserError: an archive cannot be read, two images have one name, or a name is none.
        """
        stamp = f"{FORMAT} " + json.dumps(
            [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self._files]
        )
        stamp += "" if self._labels is None else self._labels.stamp
        if self._stored("stamp") != stamp:
            write_atomically(self.path, lambda temporary: self._write(temporary, stamp, entries(), class_names()))
        self._process = 0  # look at the new file

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the archive's own labels, if it has such."""
        return json.loads(self._stored("classes") or "null")

    def names(self) -> Iterator[str]:
        """All names, sorted."""
        with closing(_open(self.path)) as connection:
            for (name,) in connection.execute("SELECT name FROM images ORDER BY name"):
                yield name

    def place(self, name: str) -> Place | None:
        """Where an image lies."""
        if self._process != os.getpid():  # a connection must not be used after a fork
            self._connection, self._process = _open(self.path), os.getpid()
        assert self._connection is not None
        found = self._connection.execute(
            "SELECT archive, offset, length, deflated FROM images WHERE name = ?", (name,)
        ).fetchone()
        return None if found is None else Place(*found)

    def _stored(self, key: str) -> str | None:
        if not self.path.is_file():
            return None
        try:
            with closing(_open(self.path)) as connection:
                found = connection.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
        except sqlite3.DatabaseError:  # no index, or one that is damaged: it is built again
            return None
        return found and found[0]

    def _write(self, path: Path, stamp: str, entries: Iterable[Entry], class_names: list[str] | None) -> None:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?nolock=1", uri=True)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT)")
            connection.execute("CREATE TABLE found (path TEXT, label INT, archive INT, offset INT, length INT, d INT)")
            connection.execute(
                "CREATE TABLE images (name TEXT PRIMARY KEY, archive INT, offset INT, length INT, deflated INT)"
                " WITHOUT ROWID"
            )
            connection.executemany("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?)", map(self._checked, entries))
            classes = self._own_classes(connection, class_names)
            rows = connection.execute("SELECT * FROM found")
            named = ((self._name(path, label, classes), *place) for path, label, *place in rows)
            for row in named:
                try:
                    connection.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", row)
                except sqlite3.IntegrityError as error:
                    raise UserError(
                        f"{self._files[row[1]]}: holds a second image {row[0]!r}, expected each name once"
                    ) from error
            connection.execute("DROP TABLE found")
            connection.execute("INSERT INTO about VALUES ('stamp', ?)", (stamp,))
            connection.execute("INSERT INTO about VALUES ('classes', ?)", (json.dumps(classes),))
            connection.commit()

    def _checked(self, entry: Entry) -> Entry:
        """Refuse member names of an untrusted archive that are not relative UTF-8 paths."""
        parts = entry.path.split("/")
        try:
            entry.path.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self._files[entry.archive]}: holds the name {entry.path!r}, expected a name in UTF-8"
            ) from error
        if not all(parts) or ".." in parts or "\0" in entry.path:
            raise UserError(f"{self._files[entry.archive]}: holds the name {entry.path!r}, expected a relative path")
        if entry.label is not None and entry.label < 0:
            entry = entry._replace(label=None)
        return entry

    def _own_classes(self, connection: sqlite3.Connection, class_names: list[str] | None) -> list[str] | None:
        """Class names by label. Without names from the archive they are its folders if each has one label of its own,
        else the labels as text."""
        labels = [label for (label,) in connection.execute("SELECT DISTINCT label FROM found ORDER BY label")]
        if self._labels is not None or not any(label is not None for label in labels):
            return None
        known = [label for label in labels if label is not None]
        if len(known) != len(labels):
            (path,) = connection.execute("SELECT path FROM found WHERE label IS NULL LIMIT 1").fetchone()
            raise UserError(f"{self._files[0]}: {path} has no label where others have one, expected one of each image")
        if class_names is not None:
            if known[-1] >= len(class_names):
                raise UserError(
                    f"{self._files[0]}: holds the label {known[-1]}, expected 0..{len(class_names) - 1} by its "
                    "class names"
                )
            return [name.replace("/", "_") for name in class_names]
        folders: dict[int, str | None] = {}
        for path, label in connection.execute("SELECT path, label FROM found"):
            folder = class_name(path)
            if folder is None or folders.setdefault(label, folder) != folder:
                return [str(label) for label in range(known[-1] + 1)]
        if len(set(folders.values())) != len(folders):
            return [str(label) for label in range(known[-1] + 1)]
        return [folders.get(label) or str(label) for label in range(known[-1] + 1)]

    def _name(self, path: str, label: int | None, classes: list[str] | None) -> str:
        if self._labels is not None:
            return self._labels.name(path)
        if label is None or classes is None:
            return path
        folder = classes[label]
        return path if class_name(path) == folder else f"{folder}/{path.replace('/', '_')}"


def _open(path: Path) -> sqlite3.Connection:
    """Read-only and without locks, which network file systems may not have: the file never changes in place."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
