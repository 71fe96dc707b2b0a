"""The local folder into which StreamingDataset copies and decompresses shards: it belongs to one content.

StreamingDataset takes whatever index and shards lie in its folder for the right ones. So each cache has a stamp,

```
CACHE/.digit_ds.json   {"index_sha256": hash of the shards' index, "owner": who uses it, "ready": bool}
```

and a cache of another content is emptied before it is used. ``ready`` is false while it is being emptied, so that a
kill in the midst of it is noticed. A named cache without a stamp is adopted when its index is the right one and refused
otherwise: it may be anybody's folder. A default cache without a stamp is what a kill left of its removal.

Default caches lie in the temporary folder, named by content and owner (two live jobs must not share one). They are
removed at the orderly end of their run; what killed runs leave is reused by the same run or, once the run directory
is gone or has other shards, removed by the next run on the node.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from digit_ds.data.objects import file_of, read_object
from digit_ds.data.shards import CONTENT, read_index
from digit_ds.errors import UserError
from digit_ds.files import PASSING, sha256, write_atomically, write_json

STAMP = ".digit_ds.json"
FAILED = ".failed-"
"""Start of the name of a file that says why a shard could not be had; it holds for one start."""
_LOCK = ".lock-"
_PREFIX = "digit_ds-cache-"

RELEASE_SECONDS = 30.0
"""How long a lock may outlive a killed job: its workers share it, and exit only when they notice that their rank is
gone."""


def default_cache(index_sha256: str, owner: str) -> Path:
    """The default cache of a content on this node for ``owner``, an absolute path that is this job's own."""
    name = hashlib.sha256(f"{index_sha256}\n{owner}\n{socket.gethostname()}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getuid()}-{name}"


def prepare(cache: Path, index_sha256: str, owner: str, named: bool = True) -> TextIO:
    """Make ``cache`` one of this content: keep it, empty it, or refuse a folder that is no cache of ours.

    For one process of each node, before any opens the dataset.

    Args:
        named: whether the user chose the folder; a default one is this package's alone.

    Returns:
        An open file; while it is open, other jobs on this node are refused.

    Raises:
        UserError: the folder holds other files, is in use by another job on this node, or cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        held = _hold(cache, RELEASE_SECONDS)
        stamp, index = read_stamp(cache), cache / "index.json"
        others = [path.name for path in cache.iterdir() if not path.name.startswith((_LOCK, STAMP, f".{STAMP}"))]
        unknown = others and stamp is None and not (index.is_file() and sha256(index) == index_sha256)
        if unknown and named:
            (cache / f"{_LOCK}{socket.gethostname()}").unlink()
            raise UserError(
                f"{cache}: holds files that are not a cache of these shards (index {index_sha256[:12]}), "
                "expected an empty folder or their cache; delete it or name another data.cache"
            )
        fresh = {"index_sha256": index_sha256, "owner": owner, "ready": True}
        stale = stamp is not None and not (stamp.get("ready") and stamp.get("index_sha256") == index_sha256)
        if unknown or stale:
            write_json(cache / STAMP, fresh | {"ready": False})
            _empty(cache)
        write_json(cache / STAMP, fresh)
        return held
    except OSError as error:
        raise UserError(
            f"{cache}: cannot be used as cache of shards ({error.strerror or error}), expected a writable folder"
        ) from error


def _hold(cache: Path, patience: float = 0.0) -> TextIO:
    """Lock a cache against other jobs on this node; released when the last process of this job has ended.

    Args:
        patience: seconds to wait for the processes of a job that was killed.
    """
    held = (cache / f"{_LOCK}{socket.gethostname()}").open("a")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            held.close()
            raise UserError(
                f"{cache}: is the shard cache of another job that runs on this node, expected a data.cache of its own"
            ) from None


def complete(cache: Path, index_sha256: str, shards: str) -> None:
    """Bring the index into a cache and remove what killed processes left half; after :func:`prepare`.

    Raises:
        UserError: the index cannot be read or is not the one of the manifest: the shards were changed or only partly
            copied.
    """
    index = cache / "index.json"
    if not index.is_file() or sha256(index) != index_sha256:
        data = read_object(file_of(shards, "index.json"), CONTENT)
        if hashlib.sha256(data).hexdigest() != index_sha256:
            raise UserError(
                f"{shards}: index.json is not the one that manifest.json names (SHA-256 {index_sha256[:12]}...), "
                f"expected {CONTENT}"
            )
        write_atomically(index, lambda temporary: temporary.write_bytes(data))
    sizes = {cache / shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in read_index(cache)}
    for path in cache.rglob("*"):
        if path in sizes:
            half = path.stat().st_size != sizes[path]
        else:
            # Being written, by this version or by the stores' clients of an earlier one: NAME.zstd, NAME.zstd.5F3aB1cD.
            end = path.name.find(".mds")
            half = (
                path.name.startswith(FAILED)
                or bool(PASSING.fullmatch(path.name))
                or path.with_name(path.name[: end + 4]) in sizes
            )
        if half:
            path.unlink()


def remove_orphans(owner: str, keep: Path) -> None:
    """Remove default caches that no run can use again: of runs that are gone, and of this owner's former shards."""
    for cache in _default_caches():
        stamp = read_stamp(cache)
        if stamp is None or cache == keep:
            continue
        of = str(stamp.get("owner", ""))
        if (of == owner or (Path(of).is_absolute() and not Path(of).parent.exists())) and not _in_use(cache):
            shutil.rmtree(cache, ignore_errors=True)


def _in_use(cache: Path) -> bool:
    try:
        _hold(cache).close()
    except (UserError, OSError):
        return True
    return False


def read_stamp(cache: Path) -> dict[str, Any] | None:
    """The stamp of a cache; None: it has none that can be read."""
    try:
        stamp = json.loads((cache / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def _default_caches() -> Iterator[Path]:
    yield from Path(tempfile.gettempdir()).glob(f"{_PREFIX}{os.getuid()}-*")


def _empty(cache: Path) -> None:
    """Remove everything but the stamp and the locks."""
    for entry in cache.iterdir():
        if entry.name == STAMP or entry.name.startswith(_LOCK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
