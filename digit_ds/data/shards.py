"""Token shards: MosaicML MDS files in blocks, one merged index, and a manifest that says what the tokens are.

```
SHARDS/manifest.json                     what the tokens are and which files made them
SHARDS/index.json                        the index that StreamingDataset reads
SHARDS/block-00000/shard.00000.mds.zstd  samples of the first block of images, in order
```
"""

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from digit_ds.data.objects import file_of, is_address, read_object
from digit_ds.errors import UserError
from digit_ds.files import is_whole, parse_json, read_json, sha256, write_json
from digit_ds.identity import Part

COLUMNS = {
    "discriminative": "ndarray:uint16",  # [G] codes 0..K-1
    "vq": "ndarray:uint16",  # [G] codes 0..N-1; this column is missing when no VQGAN was given
    "label": "int",  # position in the manifest's classes, -1: none
    "image_id": "str",  # path of the image relative to its folder
    "index": "int",  # 0-based number of the image in sorted order
    "view": "int",  # 0-based
}
COMPRESSION = "zstd:3"
HASH = "sha256"
CONTENT = "a complete directory of token shards"
"""What a place of shards should hold, for messages."""


@dataclass(frozen=True)
class ShardManifest:
    """``manifest.json`` of a shard directory."""

    images: int
    """Images that have samples (those skipped not counted)."""
    views: int
    """Samples of each image."""
    classes: list[str]
    """Names of the classes; a label is a position in this list."""
    grid: list[int]
    """Rows and columns of the tokens of one image."""
    image_size: int
    """Side in pixels of the crop that was tokenised."""
    discriminative_codes: int
    """K of the codebook."""
    vq_codes: int
    """N of the VQGAN; 0: no VQ tokens."""
    crops: str
    """How the views were cut (``digit_ds.data.images.CropKind``)."""
    provenance: dict[str, Any]
    """encoder_sha256, layer, transform, image_size, codebook_sha256, vqgan_sha256 (None without)."""
    skipped: int
    """Image files that could not be read; ``skipped.json`` lists them."""
    index_sha256: str
    """Hash of ``index.json``, which in turn holds the hash of every shard."""
    format: int = 1
    """Version of this layout."""

    @property
    def tokens(self) -> int:
        """G: tokens of one kind per image."""
        return self.grid[0] * self.grid[1]

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return self.images * self.views

    @property
    def identity(self) -> dict[str, Any]:
        """What the shards are and were made from, see :mod:`digit_ds.identity`."""
        return self.provenance | {"classes": self.classes, "shards_sha256": self.index_sha256}

    def part(self, shards: Path | str) -> Part:
        """Their identity under the name of their directory, for comparisons."""
        return Part(f"shards {shards}", self.identity)

    def write(self, directory: Path) -> None:
        """Write ``manifest.json``: the last file of a complete shard directory."""
        write_json(directory / "manifest.json", asdict(self))


def read_manifest(shards: Path | str) -> ShardManifest:
    """Read the manifest of a shard directory on disk or in an object store."""
    place = file_of(shards, "manifest.json")
    if not is_address(place) and not Path(place).is_file():
        raise UserError(f"{shards}: holds no manifest.json, expected {CONTENT}")
    values = parse_json(place, read_object(place, CONTENT))
    known = {field.name for field in fields(ShardManifest)}
    if not isinstance(values, dict) or set(values) != known or values["format"] != 1:
        raise UserError(f"{place}: has other keys or another format, expected format 1 with {', '.join(sorted(known))}")
    manifest = ShardManifest(**values)
    if problem := _problem(manifest):
        raise UserError(f"{place}: {problem}")
    return manifest


def _problem(manifest: ShardManifest) -> str | None:
    """The first value that no tool writes."""
    smallest = {"images": 1, "views": 1, "image_size": 1, "discriminative_codes": 1, "vq_codes": 0, "skipped": 0}
    for name, least in smallest.items():
        if not is_whole(found := getattr(manifest, name), least):
            return f"{name} is {reprlib.repr(found)}, expected a whole number of at least {least}"
    grid, classes = manifest.grid, manifest.classes
    if not isinstance(grid, list) or len(grid) != 2 or not all(is_whole(side, 1) for side in grid):
        return f"grid is {reprlib.repr(grid)}, expected [rows, columns]"
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return f"classes is {reprlib.repr(classes)}, expected a list of names"
    if not isinstance(manifest.provenance, dict):
        return f"provenance is {reprlib.repr(manifest.provenance)}, expected a mapping"
    return None


def write_block(directory: Path, samples: Iterable[dict[str, Any]], columns: Iterable[str]) -> None:
    """Write one block of samples as MDS files into the new folder ``directory``: equal samples give equal bytes."""
    from digit_ds.data.mosaic import MDSWriter  # here and below: importing it takes long, a manifest is read without it

    with MDSWriter(
        columns={name: COLUMNS[name] for name in columns},
        out=str(directory),
        compression=COMPRESSION,
        hashes=[HASH],
    ) as writer:
        for sample in samples:
            writer.write(sample)


def merge_blocks(directory: Path, blocks: Iterable[str]) -> str:
    """Write the one ``index.json`` over the blocks' shards, in the order given, and return its SHA-256."""
    shards = []
    for block in blocks:
        for shard in read_json(directory / block / "index.json")["shards"]:
            for part in (shard["raw_data"], shard["zip_data"]):
                part["basename"] = f"{block}/{part['basename']}"
            shards.append(shard)
    write_json(directory / "index.json", {"version": 2, "shards": shards})
    return sha256(directory / "index.json")


def read_index(directory: Path) -> list[dict[str, Any]]:
    """The shards that ``index.json`` names."""
    index = read_json(directory / "index.json")
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise UserError(f"{directory / 'index.json'}: names no shards, expected an MDS index")
    for shard in shards:
        check_columns(shard.get("column_names"), shard.get("column_encodings"), directory)
    return shards


def check_columns(names: Any, encodings: Any, source: Path | str) -> None:
    """Refuse a shard with other columns than :data:`COLUMNS`: MDS has encodings that unpickle, and so run code.

    Raises:
        UserError: names ``source`` and the first column that differs.
    """
    if not isinstance(names, list) or not isinstance(encodings, list) or len(names) != len(encodings):
        raise UserError(f"{source}: index.json describes a shard without columns, expected an MDS index")
    for name, encoding in zip(names, encodings):
        if not isinstance(name, str) or COLUMNS.get(name) != encoding:
            raise UserError(
                f"{source}: index.json has a column {reprlib.repr(name)} of {reprlib.repr(encoding)}, expected token "
                f"shards with the columns {', '.join(f'{known} ({kind})' for known, kind in COLUMNS.items())}"
            )
    if missing := [name for name in COLUMNS if name not in names and name != "vq"]:
        raise UserError(f"{source}: index.json has no column {missing[0]!r}, expected token shards")


def read_shard(directory: Path, shard: dict[str, Any]) -> list[dict[str, Any]]:
    """Samples of one shard of a local directory, its hashes checked.

    Raises:
        UserError: the shard file is missing, its bytes are not those that were written, or ``shard`` does not say how
            to read it.
    """
    try:
        return _read_shard(directory, shard)
    except UserError:
        raise
    except Exception as error:  # of a damaged index MDSReader and the decompressor raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{directory / 'index.json'}: describes a shard that cannot be read ({reason[:200]}), expected an MDS shard"
        ) from error


def _read_shard(directory: Path, shard: dict[str, Any]) -> list[dict[str, Any]]:
    from digit_ds.data.mosaic import MDSReader, decompress

    stored = shard["zip_data"] or shard["raw_data"]
    path = directory / stored["basename"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), but index.json names this shard") from error
    check_bytes(path, data, stored["bytes"], stored["hashes"])
    if shard["zip_data"]:
        data = decompress(shard["compression"], data)
        check_bytes(path, data, shard["raw_data"]["bytes"], shard["raw_data"]["hashes"])
    reader = MDSReader.from_json(str(directory), None, json.loads(json.dumps(shard)))
    count = int(np.frombuffer(data, np.uint32, 1)[0])
    offsets = np.frombuffer(data, np.uint32, count + 1, offset=4)
    return [reader.decode_sample(data[begin:end]) for begin, end in pairwise(offsets)]


def check_bytes(place: Path | str, data: bytes, size: int, hashes: Mapping[str, str]) -> None:
    """Compare a shard's bytes with the length and hashes that were stored when it was written.

    Raises:
        UserError: names ``place`` and what differs.
    """
    from digit_ds.data.mosaic import get_hash

    if len(data) != size:
        raise UserError(f"{place}: has {len(data)} bytes, expected {size} by index.json")
    for name, expected in hashes.items():
        if get_hash(name, data) != expected:
            raise UserError(f"{place}: is damaged, its {name} is not the {expected[:12]}... of index.json")


def iterate(directory: Path | str) -> Iterator[dict[str, Any]]:
    """All samples of a local shard directory in order, hashes checked; token arrays are read-only uint16 [G]."""
    directory = Path(directory)
    read_manifest(directory)
    for shard in read_index(directory):
        yield from read_shard(directory, shard)
