"""A restartable job over an image folder: fixed blocks of the sorted image list, each finished or not there.

Which images make up a block, and how the block is cut into batches, depends on the folder and the settings alone. With
W processes rank r works on the blocks r, r + W, ...: any W gives the same blocks. A killed job goes on with the blocks
that are missing. In the output directory:

```
settings.json     what the job does; another job's settings are refused
catalogue.json    number and hash of the image names, class names, where each block begins in images.jsonl
images.jsonl      the names in sorted order, one JSON string a line
skipped.json      images that could not be read, with the reason
manifest.json     written last: the job is complete
```
"""

import datetime
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from digit_ds.data.images import class_name, no_images, walk, warn_of_passed_over
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json
from digit_ds.lock import NAME as LOCK
from digit_ds.lock import DirectoryLock
from digit_ds.parallel.launch import initialize, is_main, rank, world_size

Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """Consecutive images of the sorted list."""

    number: int
    first: int
    """0-based number of the block's first image."""
    names: list[str]


class Job:
    """The output directory of a job and what is left to do in it; as a context manager, locked until the end."""

    def __init__(self, out: Path | str, images: Path | str, settings: dict[str, Any], block_images: int) -> None:
        self.out = Path(out)
        self.root = Path(images)
        self.block_images = block_images
        self._lock: DirectoryLock | None = None
        initialize()
        # Waits last as long as the slowest rank's work or the listing of the folder: no ordinary timeout fits.
        self._group = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        self.on_main(lambda: self._open(settings | {"block_images": block_images}))
        catalogue = read_json(self.out / "catalogue.json")
        self.images: int = catalogue["images"]
        self.classes: list[str] = catalogue["classes"]
        self._offsets: list[int] = catalogue["offsets"]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def complete(self) -> bool:
        """Whether an earlier run finished the job."""
        return (self.out / "manifest.json").is_file()

    @property
    def blocks(self) -> int:
        """Number of blocks of the whole job."""
        return len(self._offsets)

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """Run ``work`` on rank 0 while the others wait; when it raises a UserError there, all leave."""
        failure, result = None, None
        if is_main():
            try:
                result = work()
            except UserError as error:
                failure = error
        if self._group is not None:
            failed = [failure is not None]
            dist.broadcast_object_list(failed, src=0, group=self._group)
            if failed[0] and not is_main():
                raise SystemExit(2)  # rank 0 says why
        if failure:
            raise failure
        return result

    def barrier(self) -> None:
        """Wait for all ranks, however long they work."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def _open(self, settings: dict[str, Any]) -> None:
        """Make the directory, or check that what lies there is this very job, begun earlier; rank 0 locks it."""
        _check_begun(self.out, settings)  # before the lock, which leaves its mark
        passed_over: Counter[str] = Counter()
        names = walk(self.root, passed_over)
        first = next(names, None)
        if first is None:
            raise no_images(self.root, passed_over)
        self._lock = DirectoryLock(self.out)
        try:
            begun = _check_begun(self.out, settings)  # another job may have come first
            self._begin(settings, chain([first], names), begun)
            warn_of_passed_over(self.root, passed_over)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, settings: dict[str, Any], names: Iterator[str], begun: bool) -> None:
        """Write the settings and the list of images, which must be that of the earlier run if there was one."""
        write_json(self.out / "settings.json", settings)
        names = self._list(names)
        if begun and (self.out / "catalogue.json").is_file():
            known = read_json(self.out / "catalogue.json")
            if known["sha256"] != names["sha256"]:
                (self.out / "images.jsonl.new").unlink()
                raise UserError(
                    f"{self.root}: holds {names['images']} images that are not the {known['images']} with which "
                    f"{self.out} was begun, expected the same folder or another output directory"
                )
        (self.out / "images.jsonl.new").replace(self.out / "images.jsonl")
        write_json(self.out / "catalogue.json", names)

    def _list(self, names: Iterable[str]) -> dict[str, Any]:
        """Write the sorted names to ``images.jsonl.new`` and return the catalogue."""
        digest, offsets, classes, count, position = hashlib.sha256(), [], set(), 0, 0
        with (self.out / "images.jsonl.new").open("wb") as stream:
            for count, name in enumerate(names, 1):
                if count % self.block_images == 1 or self.block_images == 1:
                    offsets.append(position)
                line = json.dumps(name).encode() + b"\n"
                position += stream.write(line)
                digest.update(line)
                classes.add(class_name(name))
        classes.discard(None)
        return {"images": count, "sha256": digest.hexdigest(), "classes": sorted(classes), "offsets": offsets}

    def read_block(self, number: int) -> Block:
        """The names of one block."""
        names = []
        with (self.out / "images.jsonl").open("rb") as stream:
            stream.seek(self._offsets[number])
            for line in stream:
                names.append(json.loads(line))
                if len(names) == self.block_images:
                    break
        return Block(number, number * self.block_images, names)

    def my_blocks(self, done: Callable[[int], bool]) -> list[int]:
        """Numbers of the blocks that this rank has yet to do."""
        return [number for number in range(rank(), self.blocks, world_size()) if not done(number)]

    def finish(self, reports: Iterable[dict[str, Any]], max_skipped: float) -> int:
        """Write ``skipped.json`` from the blocks' reports and return how many images it lists.

        Raises:
            UserError: more than the share ``max_skipped`` of all images, or all of them, could not be read.
        """
        for leftover in set(self.out.glob(".*")) - {self.out / LOCK}:  # of runs that were killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        skipped = [entry for report in reports for entry in sorted(report["skipped"], key=lambda entry: entry["image"])]
        write_json(self.out / "skipped.json", skipped)
        if len(skipped) == self.images or len(skipped) > max_skipped * self.images:
            raise UserError(
                f"{self.root}: {len(skipped)} of {self.images} images could not be read "
                f"({skipped[0]['image']}: {skipped[0]['reason']}), at most a share of {max_skipped:g} may be skipped; "
                f"all are in {self.out / 'skipped.json'}"
            )
        return len(skipped)


def _check_begun(out: Path, settings: dict[str, Any]) -> bool:
    """Whether this very job was begun in a directory; anything else that lies there is refused."""
    path = out / "settings.json"
    if path.is_file():
        _check_same(out, read_json(path), settings)
        return True
    if out.exists() and (not out.is_dir() or any(_foreign(out))):
        raise UserError(f"{out}: already holds other files, expected an empty or a new directory")
    return False


def _check_same(out: Path, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a directory in which another job was begun, naming the first difference."""
    for key in sorted(begun.keys() | wanted.keys()):
        if begun.get(key) != wanted.get(key):
            raise UserError(
                f"{out}: already holds the results of another run, with {key} {begun.get(key)!r} where this one has "
                f"{wanted.get(key)!r}; expected the same settings or another output directory"
            )


def _foreign(out: Path) -> Iterator[Path]:
    """What lies in a directory, but for what a run leaves that is killed in its first moment."""
    return (path for path in out.iterdir() if path.name != LOCK and not path.name.startswith(".settings."))


def default_workers() -> int:
    """Decoding processes for one rank: this machine's cores, shared among its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
