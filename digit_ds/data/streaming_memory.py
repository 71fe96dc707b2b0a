"""Blocks of shared memory through which the processes of a node share a StreamingDataset.

StreamingDataset names them by the first free number, leaves them behind when it is killed, and always leaves the files
of its locks. What it expects of its caller is here: jobs that do not take the same number, no leftovers, and blocks
that are whole when they are opened.
"""

import fcntl
import itertools
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from digit_ds.data.mosaic import SharedMemory, shared_array, shared_prefix
from digit_ds.parallel import launch, shared_memory

_BLOCKS, _TEMPORARY = Path(shared_memory.FOLDER), Path(tempfile.gettempdir())
_NUMBER = "[0-9]" * 6
_PATIENCE = 60.0
"""Seconds after which a block without a size is that of a process which was killed when it had just made it."""


class _WholeMemory(SharedMemory):
    """A block that is waited for until it has its size.

    A block is made in two steps, its name and then its size. A process that finds the name taken sleeps 7 ms and opens
    the block; on a loaded machine the other one may not have made the second step ("cannot mmap an empty file").
    """

    def __init__(
        self, name: str | None = None, create: bool | None = None, size: int = 0, auto_cleanup: bool = True
    ) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                super().__init__(name, create, size, auto_cleanup)
                return
            except ValueError as error:
                if "empty file" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


vars(shared_array)["SharedMemory"] = _WholeMemory  # the name by which StreamingDataset's arrays make their blocks


@contextmanager
def one_job_at_a_time() -> Iterator[None]:
    """Mutual exclusion of this user's jobs on this node while a dataset is opened.

    Files of locks are removed meanwhile. A job on several nodes takes no lock: two such jobs could hold one node each.
    """
    if launch.world_size() != launch.local_world_size():
        yield
        return
    with _lock_file().open("a") as lock:
        if launch.local_rank() == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, by whatever ends the process
            _remove_unused_locks()
        launch.barrier()
        yield


@contextmanager
def own_numbers(cache: str) -> Iterator[None]:
    """While a dataset is opened, the search for a free number begins at one made from its cache's path.

    Each process of a node looks for a free number, then waits for all processes of the job, then one takes it: of jobs
    that start together some would take the same one and fail. A cache belongs to one job, and all of its processes on
    the node name it alike.
    """
    first = zlib.crc32(os.fsencode(Path(cache).absolute())) % 10**6 // 2  # far from where names get a seventh digit
    original = shared_prefix._each_prefix_int
    shared_prefix._each_prefix_int = lambda: itertools.count(first)
    try:
        yield
    finally:
        shared_prefix._each_prefix_int = original


def _lock_file() -> Path:
    """What :func:`one_job_at_a_time` locks."""
    return _TEMPORARY / f"digit_ds-{os.getuid()}.lock"


def forget_killed(cache: str) -> None:
    """Remove what a killed run over the same cache left in shared memory, which would be taken for a live dataset, and
    blocks whose maker was killed before they had a size, which nobody can open.

    ``streaming.base.util.clean_stale_shared_memory`` stops at the first unused number and takes live datasets of other
    jobs on the node for stale ones; this removes exactly what names ``cache``.
    """
    if launch.local_rank() == 0:
        for block in _BLOCKS.glob(f"{_NUMBER}_*"):
            with suppress(OSError):  # gone meanwhile, or another user's
                status = block.stat()
                if status.st_size == 0 and time.time() - status.st_mtime > _PATIENCE:
                    block.unlink()
        ours = str(Path(cache).absolute()).encode()
        for block in _BLOCKS.glob(f"{_NUMBER}_locals"):
            try:
                named = block.read_bytes()[4:].split(b"\0")  # a length, then paths
            except OSError:
                continue  # another job's, gone or not ours to read
            if ours not in named:
                continue
            number = block.name.partition("_")[0]
            for leftover in (*_BLOCKS.glob(f"{number}_*"), *_TEMPORARY.glob(f"{number}_*filelock")):
                leftover.unlink(missing_ok=True)
    launch.barrier()


def _remove_unused_locks() -> None:
    """Remove the files of locks whose dataset is gone: StreamingDataset leaves them, and takes their number for used.

    Only while no other job of this user opens a dataset: its processes must find the same number free.
    """
    for lock in _TEMPORARY.glob(f"{_NUMBER}_*filelock"):
        if not (_BLOCKS / f"{lock.name.partition('_')[0]}_locals").exists():
            with suppress(OSError):  # another user's
                lock.unlink()
