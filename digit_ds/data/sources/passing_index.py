"""Indexes of archives that nobody asked to keep: files in the temporary folder that are removed with their process."""

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PREFIX = f"digit_ds-index-{os.getuid()}-"
_PATIENCE = 60.0
"""Seconds within which a process locks the folder that it has made."""


def passing_index() -> Path:
    """A file that is removed with this process, not with those that it forks; also removes what killed ones left."""
    _remove_left()
    folder, process = tempfile.mkdtemp(prefix=_PREFIX), os.getpid()
    with suppress(OSError):  # a file system without locks: nobody can then take it for a killed process's
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # until this process and its forks have ended

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder) / "images.index"


def _remove_left() -> None:
    """Remove the folders of processes that were killed: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # in use, or removed in the meantime
            if time.time() - folder.stat().st_mtime < _PATIENCE:
                continue
            held = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)
