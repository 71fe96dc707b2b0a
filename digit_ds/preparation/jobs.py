"""A restartable job over an image folder: fixed blocks of the sorted image list, each finished or not there.

Which images make up a block, and how the block is cut into batches, depends on the folder and the settings alone. With
W processes rank r works on the blocks r, r + W, ...: any W gives the same blocks. A killed job goes on with the blocks
that are missing. In the output directory:

```
settings.json     what the job does; another job's settings are refused
catalogue.json    number and hash of the image names, class names, where each block begins in images.jsonl
images.jsonl      the names in sorted order, one JSON string a line
images.index      where the images lie in their archives (SQLite), unless they are files of a folder
skipped.json      images that could not be read, with the reason
manifest.json     written last: the job is complete
```
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from digit_ds.data.images import no_images, warn_of_passed_over
from digit_ds.data.sources.folder import FolderSource
from digit_ds.data.sources.opening import open_source
from digit_ds.data.sources.remote import is_remote
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json
from digit_ds.lock import NAME as LOCK
from digit_ds.parallel.decide import agree, from_main
from digit_ds.parallel.launch import initialize, rank, world_size
from digit_ds.preparation.census import Census, ClassOrder
from digit_ds.workdir import WorkDirectory, is_begun


@dataclass(frozen=True)
class Block:
    """Consecutive images of the sorted list."""

    number: int
    first: int
    """0-based number of the block's first image."""
    names: list[str]


class _Found(NamedTuple):
    """What lies in the output directory."""

    begun: bool
    complete: bool
    locked: bool
    """Whether a lock file is there: of a job that is running, or was killed before it removed the file."""


class Job:
    """The output directory of a job and what is left to do in it; as a context manager, locked until the end."""

    def __init__(
        self,
        out: Path | str,
        images: Path | str,
        settings: dict[str, Any],
        block_images: int,
        labelled: bool = False,
        labels: Path | str | None = None,
        class_order: ClassOrder = "lexicographic",
    ) -> None:
        """Claim ``out`` and list the images, on rank 0.

        Args:
            labelled: whether the folders of the images become labels; then all images lie in folders, or none does.
            labels: file of classes for images without folders, as ``open_source`` takes it.
            class_order: how class names become labels where the source does not say it.

        Raises:
            UserError: there are no images, ``out`` is another job's, or an image has no label where others have one.
        """
        self.labelled = labelled
        self.out = Path(out)
        self.root = images if is_remote(images) else Path(images)
        self.block_images = block_images
        self.class_order = class_order
        initialize()
        self.source = from_main(lambda: open_source(self.root, self.out / "images.index", labels))
        settings = agree(settings | {"block_images": block_images}, f"{self.out}, its settings")
        self._directory = WorkDirectory(self.out, lambda: self._look(settings), _needs_no_lock)
        try:
            catalogue = from_main(lambda: self._begin(settings, self._directory.found))
        except BaseException:
            self._directory.release()
            raise
        self.images: int = catalogue["images"]
        self.classes: list[str] = catalogue["classes"]
        self._offsets: list[int] = catalogue["offsets"]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *failure: Any) -> None:
        self._directory.__exit__(*failure)

    @property
    def complete(self) -> bool:
        """Whether an earlier run finished the job, as rank 0 saw it at the start."""
        return self._directory.found.complete

    @property
    def blocks(self) -> int:
        """Number of blocks of the whole job."""
        return len(self._offsets)

    def _look(self, settings: dict[str, Any]) -> _Found:
        begun = is_begun(self.out, _stored(self.out), settings)
        return _Found(begun, begun and (self.out / "manifest.json").is_file(), (self.out / LOCK).exists())

    def _begin(self, settings: dict[str, Any], found: _Found) -> dict[str, Any]:
        """Write the settings and the list of images, which must be that of the earlier run; return the catalogue.

        Where that run completed the job nothing is written: the directory may be read-only by then.
        """
        passed_over: Counter[str] = Counter()
        listed = self.source.names(passed_over)
        first = next(listed, None)
        if first is None:
            raise no_images(self.root, passed_over)
        if not found.complete:
            write_json(self.out / "settings.json", settings)
        census, new = Census(), Path(os.devnull) if found.complete else self.out / "images.jsonl.new"
        names = self._list(chain([first], listed), census, new)
        classes = names["classes"] = census.ordered(self.root, self.source.classes, self.class_order)
        if found.begun and (self.out / "catalogue.json").is_file():
            known = read_json(self.out / "catalogue.json")
            if known["sha256"] != names["sha256"]:
                if not found.complete:
                    new.unlink()
                raise UserError(
                    f"{self.root}: holds {names['images']} images that are not the {known['images']} with which "
                    f"{self.out} was begun, expected the same folder or another output directory"
                )
            if known.get("classes", classes) != classes:
                raise UserError(
                    f"{self.root}: its labels stand for other classes than those with which {self.out} was begun, "
                    "expected the same or another output directory"
                )
        if self.labelled:
            census.check(self.root)
        if not found.complete:
            new.replace(self.out / "images.jsonl")
            write_json(self.out / "catalogue.json", names)
        warn_of_passed_over(self.root, passed_over)
        print(census.summary(self.root, classes), flush=True)
        for warning in census.warnings(self.root, classes, isinstance(self.source, FolderSource)):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        return names

    def _list(self, names: Iterable[str], census: Census, new: Path) -> dict[str, Any]:
        """Write the sorted names to ``new`` and return the catalogue."""
        digest, offsets, count, position = hashlib.sha256(), [], 0, 0
        with new.open("wb") as stream:
            for count, name in enumerate(names, 1):
                if count % self.block_images == 1 or self.block_images == 1:
                    offsets.append(position)
                line = json.dumps(name).encode() + b"\n"
                position += stream.write(line)
                digest.update(line)
                census.count(name)
        return {"images": count, "sha256": digest.hexdigest(), "classes": census.classes, "offsets": offsets}

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
        """Numbers of the blocks that this rank has yet to do, of those that rank 0 does not see ``done``."""
        missing = from_main(lambda: [number for number in range(self.blocks) if not done(number)])
        return [number for number in missing if number % world_size() == rank()]

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


def _needs_no_lock(found: _Found) -> bool:
    """A complete directory is only read, but what a kill in the last moment left is put in order."""
    return found.complete and not found.locked


def _stored(out: Path) -> dict[str, Any] | None:
    """The settings of the job that was begun in a directory."""
    path = out / "settings.json"
    return read_json(path) if path.is_file() else None


def default_workers() -> int:
    """Decoding processes for one rank: this machine's cores, shared among its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
