"""How many images each class has, printed before a long job starts, so that a wrong folder is noticed."""

from collections import Counter
from pathlib import Path
from typing import Literal

from digit_ds.data.images import class_name
from digit_ds.errors import UserError

ClassOrder = Literal["lexicographic", "numeric"]
"""How class names become labels: as strings, where ``10`` comes before ``2``, or as numbers."""

_SPLITS = {"train", "val", "validation", "test"}


class Census:
    """Counts the images of each class folder."""

    def __init__(self) -> None:
        self.images: Counter[str] = Counter()
        self.without_class = 0
        self.first_without_class: str | None = None

    def count(self, name: str) -> None:
        """Count one image by its name relative to the image folder."""
        folder = class_name(name)
        if folder is not None:
            self.images[folder] += 1
            return
        self.without_class += 1
        self.first_without_class = self.first_without_class or name

    @property
    def classes(self) -> list[str]:
        """Class names in lexicographic order; a label is a position in this list."""
        return sorted(self.images)

    def ordered(self, root: Path | str, known: list[str] | None, order: ClassOrder) -> list[str]:
        """Class names in the order of their labels: ``known`` by the source, else by ``order``.

        Raises:
            UserError: numeric order is asked for names that are not numbers, or where the source has labels of its own.
        """
        if order == "lexicographic":
            return self.classes if known is None else known
        if known is not None:
            raise UserError(f"{root}: has labels of its own, expected class order 'lexicographic', which keeps them")
        if other := next((name for name in self.classes if not name.isdecimal()), None):
            raise UserError(f"{root}: class {other!r} is not a number, expected only numbers for class order 'numeric'")
        return sorted(self.classes, key=lambda name: (int(name), name))

    def check(self, root: Path | str) -> None:
        """Refuse a set in which some images have a class and others have none.

        Raises:
            UserError: names the first image without a class.
        """
        if self.images and self.first_without_class is not None:
            raise UserError(
                f"{root}/{self.first_without_class}: lies in no class folder ({self.without_class} such images), but "
                f"{root} has {len(self.images)} class folders, expected all images in class folders or none"
            )

    def summary(self, root: Path | str, names: list[str]) -> str:
        """Images, classes, the smallest and the largest class, the first and the last of ``names``, in one line."""
        total = sum(self.images.values()) + self.without_class
        if not self.images:
            return f"{root}: {total:,} images, no classes"
        least, most = min(self.images.values()), max(self.images.values())
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        shown = names if len(names) <= 3 else [names[0], names[1], "...", names[-1]]
        return f"{root}: {total:,} images, {len(names):,} classes of {each} images: {', '.join(shown)}"

    def warnings(self, root: Path | str, ordered: list[str], in_folders: bool) -> list[str]:
        """What is probably not meant: empty class folders, splits taken for classes, numbers in lexicographic order."""
        names = self.classes
        found: list[str] = []
        if not names:
            return found
        folders = Path(root).iterdir() if in_folders else ()
        empty = sorted(entry.name for entry in folders if entry.is_dir() and not entry.name.startswith("."))
        if empty := [name for name in empty if name not in self.images]:
            found.append(
                f"{root}: {len(empty)} folders without images are not classes and have no label: "
                f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}"
            )
        if len(names) > 1 and set(names) <= _SPLITS:
            found.append(f"{root}: the folders {' and '.join(names)} are taken for classes, expected one of them alone")
        if all(map(str.isdecimal, names)) and names == ordered and names != (numeric := sorted(names, key=int)):
            label = next(label for label, (name, number) in enumerate(zip(names, numeric)) if name != number)
            found.append(
                f"{root}: classes are in lexicographic order: label {label} is class {names[label]!r}; "
                "--class-order numeric changes it"
            )
        return found
