"""A folder of images as two, for training and for validation."""

import hashlib
import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path

from digit_ds.data.images import class_name, warn_of_passed_over
from digit_ds.data.sources.folder import FolderSource
from digit_ds.data.sources.opening import SPLITS, list_source, open_source
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json
from digit_ds.preparation.settings import SplitSettings
from digit_ds.workdir import is_begun

RECORD = "split.json"
"""What a finished split was made with."""


def split_images(settings: SplitSettings) -> None:
    """Link every image below ``settings.images`` from ``OUT/train`` or ``OUT/val``, class folder by class folder.

    Of each class the images whose SHA-256 of (seed, name) is smallest are held out: the same images give the same split
    on every machine. ``OUT`` appears when it is complete; the same call again does nothing.

    Raises:
        UserError: ``images`` is no folder of images or is split already, a class has one image, or ``OUT`` holds
            something else.
    """
    root, out = Path(settings.images), Path(settings.out)
    if out.absolute().is_relative_to(root.absolute()):
        raise UserError(f"{out}: lies inside {root}, expected a folder outside of the images")
    source = open_source(root)
    if not isinstance(source, FolderSource):
        raise UserError(f"{root}: is an archive, expected a folder of images")
    passed_over: Counter[str] = Counter()
    names = list_source(source, passed_over)
    groups: defaultdict[str | None, list[str]] = defaultdict(list)
    for name in names:
        groups[class_name(name)].append(name)
    if found := sorted({*SPLITS} & {group for group in groups if group}):
        raise UserError(f"{root}: has the folder {found[0]}, expected images that are not split yet")
    held_out = {name for group, members in groups.items() for name in _held_out(root, group, members, settings)}
    listed = hashlib.sha256(b"\n".join(map(os.fsencode, names))).hexdigest()
    record = {"images": str(root.resolve()), "names_sha256": listed, **settings.record()}
    before = read_json(out / RECORD) if (out / RECORD).is_file() else None
    if is_begun(out, before, record, another="holds another split", foreign="exists and is no split"):
        print(f"{out}: complete already")
        return
    warn_of_passed_over(root, passed_over)  # once nothing can be refused any more
    try:
        _link(root.resolve(), out, names, held_out, record)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    counts = {"train": len(names) - len(held_out), "val": len(held_out)}
    print(", ".join(f"{out / part}: {count:,} images" for part, count in counts.items()))


def _held_out(root: Path, group: str | None, members: list[str], settings: SplitSettings) -> list[str]:
    if len(members) < 2:
        raise UserError(f"{root / (group or '')}: holds 1 image, expected at least 2: one of each class is held out")
    drawn = sorted(members, key=lambda name: hashlib.sha256(os.fsencode(f"{settings.seed}/{name}")).digest())
    return drawn[: min(len(members) - 1, max(1, round(settings.share * len(members))))]


def _link(root: Path, out: Path, names: list[str], held_out: set[str], record: dict) -> None:
    passing = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(passing, ignore_errors=True)  # of a process that was killed
    for name in names:
        link = passing / ("val" if name in held_out else "train") / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(root / name)
    write_json(passing / RECORD, record)
    passing.rename(out)
