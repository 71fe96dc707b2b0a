"""Images in a folder; classes are its folders, or come from a file of labels (Kaggle's flat ``val``)."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from digit_ds.data.images import UnreadableImageError, walk
from digit_ds.data.sources.labels import Labels


class FolderSource:
    """The image files below ``root``; see :class:`~digit_ds.data.sources.protocol.ImageSource`."""

    def __init__(self, root: Path, labels: Labels | None = None) -> None:
        self.root, self._labels = root, labels
        self.classes: list[str] | None = None

    def names(self, passed_over: Counter[str]) -> Iterator[str]:
        """Sorted names; with labels the class stands before the file's name."""
        found = walk(self.root, passed_over)
        return found if self._labels is None else iter(sorted(map(self._labels.name, found)))

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        path = self.root / (name if self._labels is None else name.partition("/")[2])
        try:
            return path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error
