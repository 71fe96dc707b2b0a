"""One job at a time writes in a directory: an advisory lock that no kill leaves behind."""

import errno
import fcntl
import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from digit_ds.errors import UserError
from digit_ds.files import PASSING, make_directory

NAME = ".lock"

_FIRST = (".settings.", ".manifest.", ".recipe.", ".demo.")
"""Beginnings of the passing names of the files that jobs write first, see ``write_atomically``."""


class DirectoryLock:
    """The right to write in ``directory``, from now until ``release`` or the end of this process, whatever ends it.

    Rank 0 holds it for all processes of a job. It is a POSIX record lock (``lockf``) on the file ``.lock`` inside: the
    system drops it with the process, forked workers do not inherit it, and it holds between hosts on NFSv4, on GPFS and
    on Lustre mounted with ``flock``. Where a file system has no locks, a warning is printed and nothing is locked. It
    keeps out other processes, not this one.

    Raises:
        UserError: another process holds it, or the directory cannot be made or written to.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        self._path = self._directory / NAME
        try:
            self._made = not self._directory.exists()
            self._stream = self._acquire()
            self._stream.truncate(0)
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, self._stream)
            self._stream.flush()
        except OSError as error:
            raise UserError(f"{self._directory}: cannot be written to ({error.strerror or error})") from error

    def release(self) -> None:
        """Release the lock; the directory is removed again if it was made here and holds nothing.

        Never fails: a directory that became read-only or was removed is reported by the job that wrote there.
        """
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._stream.close()
        if self._made:
            with suppress(OSError):
                self._directory.rmdir()

    def _acquire(self) -> IO[str]:
        while True:
            try:
                make_directory(self._directory)
                stream = self._path.open("a+", encoding="utf-8")
            except FileNotFoundError:  # its creator has just removed the directory
                continue
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise UserError(self._refusal(stream)) from error
                print(
                    f"{self._directory}: cannot be locked here ({error.strerror}), see that no other job writes there",
                    file=sys.stderr,
                )
                return stream
            if self._is_current(stream):
                return stream
            stream.close()

    def _is_current(self, stream: IO[str]) -> bool:
        """Whether the locked file is still the one of that name: its last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _refusal(self, stream: IO[str]) -> str:
        stream.seek(0)
        try:
            holder = json.load(stream)
            who = f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):  # it holds the lock but has not written its name yet
            who = "another process"
        return f"{self._directory}: {who} is writing there, wait until it has ended or use another directory"


def remove_unfinished(directory: Path) -> None:
    """Remove what ``files.write_atomically`` was writing, at any depth, in processes that were killed.

    For the holder of the directory's lock: a live process would lose what it writes. Folders below that have a lock of
    their own are left alone.
    """
    for folder, below, names in os.walk(directory):
        if NAME in names and Path(folder) != directory:
            below.clear()
            continue
        for name in names:
            if PASSING.fullmatch(name):
                Path(folder, name).unlink(missing_ok=True)


def is_empty(directory: Path) -> bool:
    """Whether a directory holds nothing, or only what a job leaves that was killed in its first moment."""
    return all(path.name == NAME or path.name.startswith(_FIRST) for path in directory.iterdir())
