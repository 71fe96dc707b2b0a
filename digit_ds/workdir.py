"""Directories that a job writes: one protocol for every stage.

1. All processes of the job call ``WorkDirectory(path, look)`` together; rank 0 alone reads the file system.
2. ``look`` reads what lies there: nothing (a new job), this very job (it continues, or is complete), or something else,
   which ``is_begun`` refuses with one line that names the first setting that differs.
3. Rank 0 looks, locks the directory unless the job is complete, and looks again: another job may have come first.
   Then it removes what killed processes had not finished writing.
4. What ``look`` returned goes to all processes. After a refusal all leave with exit status 2; rank 0 prints it, once.
5. Then every process must see the directory: one that does not is on another file system, and all leave.
6. The job writes its settings first and every file whole or not at all (``digit_ds.files``), so that it can be killed
   at any moment; the same call again continues. The file that says that the job is complete comes last.
7. A file system that fails meanwhile (permissions, read-only, full, the directory removed) ends the job in one line
   that names the path. Releasing the lock never hides that.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from digit_ds.errors import UserError, file_error
from digit_ds.lock import DirectoryLock, is_empty, remove_unfinished
from digit_ds.parallel.decide import fail_together, from_main
from digit_ds.parallel.launch import host, rank, world_size

Found = TypeVar("Found")

SEEN_SECONDS = 10.0
"""Seconds until a directory that rank 0 made must be visible elsewhere: network file systems cache attributes."""


class WorkDirectory(Generic[Found]):
    """The right of this job, all its processes together, to write in ``path`` until ``release`` or the end of ``with``.

    Args:
        path: the directory; made where it does not exist, and removed again if nothing was written.
        look: reads on rank 0 what lies there, twice, and raises a ``UserError`` where the job must not go on.
        is_complete: whether what ``look`` returned means that nothing is left to do: the directory, which may be
            read-only by then, is not locked.

    Attributes:
        found: what ``look`` returned, on every process.

    Raises:
        UserError: on rank 0, when ``look`` refused or another job is writing there; the others leave silently.
    """

    def __init__(
        self, path: Path | str, look: Callable[[], Found], is_complete: Callable[[Found], bool] = lambda _: False
    ) -> None:
        self.path = Path(path)
        self._lock: DirectoryLock | None = None
        self._is_complete = is_complete
        self.found: Found = from_main(lambda: self._enter(look))
        if is_complete(self.found):
            return
        try:
            fail_together(self._unseen())
        except BaseException:
            self.release()
            raise

    def _enter(self, look: Callable[[], Found]) -> Found:
        found = look()  # before the lock, which creates a file
        if self._is_complete(found):
            return found
        self._lock = DirectoryLock(self.path)
        try:
            found = look()
            remove_unfinished(self.path)  # no other process writes there now
            return found
        except BaseException:
            self.release()
            raise

    def _unseen(self) -> str | None:
        deadline = time.monotonic() + SEEN_SECONDS
        while not self.path.is_dir():
            if time.monotonic() > deadline:
                return (
                    f"{self.path}: rank {rank()} of {world_size()} on {host()} does not see this directory, which rank "
                    "0 writes to, expected a file system that all processes share"
                )
            time.sleep(0.2)
        return None

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "WorkDirectory[Found]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
        if isinstance(error, OSError) and (known := file_error(error, self.path)) is not None:
            raise known from error


def is_begun(
    path: Path,
    found: Mapping[str, Any] | None,
    wanted: Mapping[str, Any],
    *,
    another: str = "already holds the results of another run",
    foreign: str = "already holds other files",
) -> bool:
    """Whether the job with the settings ``wanted`` was begun in ``path``; anything else that lies there is refused.

    Args:
        path: the directory, which need not exist.
        found: the settings stored there; None where there are none.
        wanted: the settings of this job, as JSON gives them back.
        another: says in the refusal that ``found`` is of another job.
        foreign: says in the refusal that the directory holds files but no settings.

    Raises:
        UserError: the settings differ, or the directory holds other files or is none.
    """
    if found is None:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to {path.readlink()}, which does not exist, expected a directory")
        if path.exists() and not (path.is_dir() and is_empty(path)):
            raise UserError(f"{path}: {foreign}, expected an empty or a new directory")
        return False
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            key, theirs, ours = _first_difference(name, found.get(name), wanted.get(name))
            raise UserError(
                f"{path}: {another} whose {key} is {_brief(theirs)}, but this one's is {_brief(ours)}; expected the "
                "same settings or a new --out folder"
            )
    return True


def _first_difference(key: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """The dotted key of the first value that differs below ``key``, and both values; None: the key is not there."""
    theirs, ours = ({} if value is None else value for value in (found, wanted))
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                return _first_difference(f"{key}.{name}", theirs.get(name), ours.get(name))
    return key, found, wanted


def _brief(value: Any) -> str:
    """A setting in a line; hashes are cut short."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
