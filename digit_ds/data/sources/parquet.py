"""Images in parquet files as Hugging Face writes them: columns ``image`` {bytes, path} and perhaps ``label``.

Other columns are not read. Images that a file holds uncompressed, as Hugging Face writes them, are found in it once,
when the index is built, and then read by offset. Of others pyarrow reads a row group at a time, and each process keeps
its last one: images that are sorted by class in the files are read once, shuffled ones need a row group each.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from digit_ds.data.images import UnreadableImageError
from digit_ds.data.sources.archive import Bytes
from digit_ds.data.sources.index import Index
from digit_ds.data.sources.protocol import ArchiveFile, Entry
from digit_ds.errors import UserError


class ParquetSource:
    """The rows of some parquet files; see :class:`~digit_ds.data.sources.protocol.ImageSource`."""

    def __init__(self, root: Path | str, files: Sequence[ArchiveFile], index: Path) -> None:
        self.root, self._files = root, files
        self._index = Index(index, files, None)
        self._bytes = Bytes(files)
        self._process = 0
        self._open: dict[int, Any] = {}
        self._group: tuple[tuple[int, int], Any] = ((-1, -1), None)

    @property
    def classes(self) -> list[str] | None:
        """Class names by label."""
        return self._index.classes

    def names(self, passed_over: Counter[str]) -> Iterator[str]:
        """Sorted names, from the index, which is built where it is missing."""
        self._index.build(self._entries, self._class_names)
        return self._index.names()

    def read(self, name: str) -> bytes:
        """The bytes of a row's image."""
        place = self._index.place(name)
        if place is None:
            raise UnreadableImageError("not in the files")
        if place.offset >= 0:
            return self._bytes.read(place.archive, place.length, place.offset)
        group = -1 - place.offset
        if self._process != os.getpid():
            self._process, self._open, self._group = os.getpid(), {}, ((-1, -1), None)
        key = (place.archive, group)
        if self._group[0] != key:
            try:
                if place.archive not in self._open:
                    self._open[place.archive] = _file(self._files[place.archive])
                column = self._open[place.archive].read_row_group(group, ["image.bytes"], use_threads=False)
                self._group = (key, column["image"].combine_chunks().field("bytes"))
            except UserError:  # an object store that does not answer
                raise
            except Exception as error:  # ArrowInvalid, OSError: whatever damaged pages lead to
                raise UnreadableImageError(f"damaged row group {group} of {self._files[place.archive].name}") from error
        data = self._group[1][place.length].as_py()
        if data is None:
            raise UnreadableImageError("has no bytes")
        return data

    def _entries(self) -> Iterator[Entry]:
        paths_serve = self._paths_serve()
        for number, file in enumerate(self._files):
            parquet, row_in_file = _file(file), 0
            labelled = "label" in parquet.schema_arrow.names
            for group in range(parquet.num_row_groups):
                columns = _read(file, parquet, group, ["image.path", "label"] if labelled else ["image.path"])
                paths = columns["image"].combine_chunks().field("path").to_pylist()
                labels: list[Any] = columns["label"].to_pylist() if labelled else [None] * len(paths)
                places = _places(file, parquet, group)
                for row, (path, label) in enumerate(zip(paths, labels)):
                    name = path.lstrip("/") if paths_serve else f"{file.stem}-{row_in_file:07d}"
                    if label is not None and not isinstance(label, int):
                        raise UserError(f"{file}: column label holds {label!r}, expected the number of a class")
                    offset, length = places[row] if places else (-1 - group, row)
                    yield Entry(name, label, number, offset, length)
                    row_in_file += 1

    def _paths_serve(self) -> bool:
        """Whether every image has a path and no two have the same; otherwise names are made of file and row."""
        seen: set[str] = set()
        for file in self._files:
            parquet = _file(file)
            for group in range(parquet.num_row_groups):
                column = _read(file, parquet, group, ["image.path"])["image"].combine_chunks().field("path")
                for path in column.to_pylist():
                    if not path or path in seen:
                        return False
                    seen.add(path)
        return True

    def _class_names(self) -> list[str] | None:
        """Names of the labels: from the schema's ``huggingface`` metadata, else from the card beside the files."""
        metadata = _file(self._files[0]).schema_arrow.metadata or {}
        try:
            features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            if names := features.get("label", {}).get("names"):
                return [str(name) for name in names]
        except (ValueError, AttributeError):  # metadata of others
            pass
        if not isinstance(first := self._files[0], Path):
            return None
        folder = first.parent
        card = next((path / "README.md" for path in (folder, folder.parent) if (path / "README.md").is_file()), None)
        return None if card is None else _card_names(card)


def _card_names(card: Path) -> list[str] | None:
    """``dataset_info.features[label].dtype.class_label.names`` in the front matter of a data set's card."""
    try:
        _, front, _ = card.read_text(encoding="utf-8").split("---\n", 2)
        info = yaml.safe_load(front)["dataset_info"]
        features = (info[0] if isinstance(info, list) else info)["features"]
        names = next(f for f in features if f["name"] == "label")["dtype"]["class_label"]["names"]
        return [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, dict) else list(map(str, names))
    except Exception:  # a card without them, or none at all
        return None


def _file(path: ArchiveFile) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile  # only those who have such files wait for it

    try:
        parquet = ParquetFile(path, memory_map=True) if isinstance(path, Path) else ParquetFile(path.open("rb"))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a complete parquet file") from error
    schema = parquet.schema_arrow
    image = schema.field("image").type if "image" in schema.names else None
    names = [image.field(at).name for at in range(image.num_fields)] if image is not None else []
    if not {"bytes", "path"} <= set(names):
        raise UserError(
            f"{path}: has the columns {', '.join(schema.names)}, expected image with the fields bytes and path"
        )
    return parquet


def _places(file: ArchiveFile, parquet: Any, group: int) -> list[tuple[int, int]] | None:
    """Offset and length of each image of a row group in its file; None where one is not found there as it is."""
    columns = parquet.metadata.row_group(group)
    column = next(
        chunk for at in range(columns.num_columns) if (chunk := columns.column(at)).path_in_schema == "image.bytes"
    )
    if column.compression != "UNCOMPRESSED":
        return None
    values = _read(file, parquet, group, ["image.bytes"])["image"].combine_chunks().field("bytes")
    first = column.data_page_offset
    if column.has_dictionary_page:
        first = min(first, column.dictionary_page_offset)
    with file.open("rb") as stream:
        stream.seek(first)
        raw = stream.read(column.total_compressed_size)
    places, position = [], 0
    for value in values:
        data = value.as_py()
        if data is None or (found := raw.find(data, position)) < 0:
            return None
        places.append((first + found, len(data)))
        position = found + len(data)
    return places


def _read(file: ArchiveFile, parquet: Any, group: int, columns: list[str]) -> Any:
    import pyarrow

    try:
        return parquet.read_row_group(group, columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: row group {group} cannot be read ({error}), expected a complete parquet file"
        ) from error
