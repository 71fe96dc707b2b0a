"""Reading training checkpoints: which one to use, whether it is whole, and pieces of its state at any layout."""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.files import is_whole, read_json, sha256
from digit_ds.model import weights
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.tensor_file import Content
from digit_ds.safe_load import MAPPED_BYTES
from digit_ds.settings import brief

MANIFEST = "manifest.json"
LATEST = "latest"
COPY_TOLERANCE = 1e-5
"""Largest difference between tensor-parallel ranks' copies of one parameter that is taken for rounding, as a share of
the parameter's largest magnitude."""

PIECE = 1 << 20
"""Elements that are read at a time where a parameter is handed on in pieces."""


def checkpoint_name(step: int) -> str:
    """Folder of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoint_step(checkpoint: Path) -> int:
    """Step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names if it is complete, else the newest complete one of its lineage."""
    return next(lineage(folder), None)


def lineage(folder: Path) -> Iterator[Path]:
    """The complete ones of :func:`walk_lineage`."""
    return (path for path, problem in walk_lineage(folder) if problem is None)


def walk_lineage(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Checkpoints from the one that ``latest`` names back through their parents, each with what it lacks, if anything.

    Where a manifest cannot be read or names no parent (format 1), the next lower step takes the parent's place.
    Checkpoints of a branch that was left by rolling back are not met.
    """
    steps = sorted((checkpoint_step(path) for path in folder.glob("step_*") if path.name[5:].isdigit()), reverse=True)
    step: int | None
    try:
        step = checkpoint_step(Path((folder / LATEST).read_text(encoding="utf-8").strip()))
    except (OSError, ValueError):
        step = steps[0] if steps else None
    while step is not None:
        path = folder / checkpoint_name(step)
        yield path, incompleteness(path)
        parent = _parent(path)
        if parent is None or not (parent < step and parent in steps):
            parent = next((lower for lower in steps if lower < step), None)
        step = parent


def _parent(checkpoint: Path) -> int | None:
    try:
        parent = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["parent"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return parent if is_whole(parent, 0, 2**63) else None


def part_name(tensor_rank: int, data_rank: int) -> str:
    """File of one rank's part."""
    return f"tensor-{tensor_rank}.data-{data_rank}.safetensors"


def is_complete(checkpoint: Path) -> bool:
    """Whether the manifest is there and names a part of every rank, each of its size."""
    return incompleteness(checkpoint) is None


def incompleteness(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, naming the file; None: nothing."""
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, layout = manifest["files"], manifest.get("layout")
        if layout is not None and len(files) != (ranks := layout["tensor"] * layout["data"]):
            return f"{path}: names {len(files)} parts, expected one of each of {ranks} ranks"
        for name, entry in files.items():
            path = checkpoint / name
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{path}: has {size} bytes, expected {entry['bytes']}"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{path}: is not a checkpoint's manifest"
    return None


@dataclass
class Progress:
    """How far a run is: everything besides weights and moments. All of it is the same on every rank."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    step: NonNegativeInt = 0
    images: NonNegativeInt = 0
    """Samples seen; the position in the data's endless sequence."""
    samples_hash: NonNegativeInt = 0
    """Chained hash of the sample ids of all steps."""
    skipped: NonNegativeInt = 0
    """Updates skipped because the gradient was not finite."""
    skipped_in_a_row: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    """Wall clock spent in training steps."""
    adam_steps: NonNegativeInt = 0
    """Updates applied."""


class _File(BaseModel):
    """What the manifest says of one part."""

    model_config = ConfigDict(strict=True)
    bytes: NonNegativeInt
    sha256: str
    pieces: dict[str, tuple[NonNegativeInt, NonNegativeInt]] | None = None
    """Parameter -> first element and length."""


class _Layout(BaseModel):
    """The layout that the parts were written at."""

    model_config = ConfigDict(strict=True)
    tensor: Annotated[int, Field(ge=1, le=1 << 16)]


class _Manifest(BaseModel):
    """The keys of a manifest that reading needs; others are ignored."""

    model_config = ConfigDict(strict=True)
    progress: Progress
    layout: _Layout
    files: dict[str, _File] = Field(min_length=1)
    provenance: dict[str, Any] = {}


class Damaged(UserError):
    """A file of a checkpoint does not hold what was written."""


class _Piece(NamedTuple):
    """A flat part of one stored rank's slice of a parameter."""

    start: int
    end: int
    file: str


class StoredState:
    """The state in a checkpoint's files: single pieces for a rank, whole tensors for export.

    Raises:
        Damaged: the manifest or a file's header is not what was written.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self._opened: dict[str, Any] = {}
        self._mapped = 0  # bytes read from them
        try:
            self.manifest: dict[str, Any] = read_json(checkpoint / MANIFEST)
            checked = _Manifest.model_validate_json(json.dumps(self.manifest))
            self.progress = checked.progress
            self.spec = TransformerSpec.from_dict(self.manifest["spec"], str(checkpoint / MANIFEST))
            self.tensor_size = checked.layout.tensor
            self._files = checked.files
            self._pieces = self._index()
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise Damaged(f"{checkpoint / MANIFEST}: {brief(key)}: {problem['msg']}") from error
        except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise Damaged(f"{checkpoint}: cannot be read ({error})") from error

    def _index(self) -> dict[tuple[int, str], list[_Piece]]:
        """(tensor rank, parameter) -> its pieces in order. Format 1 has them in the files' headers only."""
        pieces: dict[tuple[int, str], list[_Piece]] = defaultdict(list)
        for name, entry in self._files.items():
            rank = int(name.partition(".")[0].removeprefix("tensor-"))
            if (held := entry.pieces) is None:
                file = self._open(name)
                starts = json.loads(file.metadata()["starts"])
                held = {key: (start, *file.get_slice(f"weight/{key}").get_shape()) for key, start in starts.items()}
            for parameter, (start, length) in held.items():
                pieces[rank, parameter].append(_Piece(start, start + length, name))
        for found in pieces.values():
            found.sort()
        return pieces

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            try:
                self._opened[name] = safe_open(self.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise Damaged(f"{self.path / name}: cannot be read ({error})") from error
        return self._opened[name]

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare every ``shares``-th file, from number ``share`` on, with its hash in the manifest.

        Raises:
            Damaged: names the first file that differs.
        """
        for name in sorted(self._files)[share::shares]:
            if sha256(self.path / name) != self._files[name].sha256:
                raise Damaged(f"{self.path / name}: is damaged, its SHA-256 is not the one in {MANIFEST}")

    def kinds(self) -> list[str]:
        """``weight`` and the optimizer states that were saved."""
        first = self._open(next(iter(self._files)))
        return sorted({key.partition("/")[0] for key in first.keys()})  # noqa: SIM118 - not a dict

    def contents(self, kind: str) -> dict[str, Content]:
        """Whole parameters of one kind under the schema's names, vocabulary padding removed, read when they are used.

        ``PIECE`` elements are held at a time, or all of a parameter that tensor-parallel ranks hold whole.
        """

        def content(parameter: weights.Parameter) -> Content:
            count = math.prod(parameter.shape)
            step = PIECE if parameter.split_dim is not None else max(count, 1)
            return Content(
                torch.float32,
                parameter.shape,
                lambda: (
                    self.piece(kind, parameter, 1, 0, start, min(start + step, count))
                    for start in range(0, count, step)
                ),
            )

        return {parameter.name: content(parameter) for parameter in weights.parameters(self.spec)}

    def piece(
        self, kind: str, parameter: weights.Parameter, tensor_size: int, rank: int, start: int, end: int
    ) -> Tensor:
        """Elements ``start`` to ``end`` of a tensor-parallel rank's flattened slice, whatever the stored layout.

        Only what overlaps is read.
        """
        if parameter.split_dim is None:
            return self._agreed(kind, parameter, start, end)
        length = math.prod(weights.shard_shape(parameter, tensor_size))
        if parameter.split_dim == 0 or tensor_size == self.tensor_size:  # contiguous in the whole tensor, or stored so
            return self._contiguous(kind, parameter, rank * length + start, rank * length + end)
        return self._columns(kind, parameter, length // parameter.shape[0], rank, start, end)

    def _contiguous(self, kind: str, parameter: weights.Parameter, start: int, end: int) -> Tensor:
        """Elements of the stored ranks' flattened slices, one after the other."""
        length, parts = math.prod(weights.shard_shape(parameter, self.tensor_size)), []
        for rank in range(start // length, -(-end // length)):
            first = rank * length
            inside = max(start - first, 0), min(end - first, length)
            parts.append(self._flat(kind, parameter.name, rank, *inside))
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _columns(self, kind: str, parameter: weights.Parameter, width: int, rank: int, start: int, end: int) -> Tensor:
        """Elements of the flattened slice that has ``width`` columns from ``rank * width`` on, of a matrix whose
        columns the stored ranks share."""
        stored = weights.shard_shape(parameter, self.tensor_size)[1]
        first, last = start // width, -(-end // width)  # rows
        left, right = rank * width, (rank + 1) * width
        parts = []
        for other in range(left // stored, -(-right // stored)):
            rows = self._flat(kind, parameter.name, other, first * stored, last * stored).view(-1, stored)
            parts.append(rows[:, max(left - other * stored, 0) : min(right - other * stored, stored)])
        return torch.cat(parts, dim=1).reshape(-1)[start - first * width : end - first * width]

    def _flat(self, kind: str, name: str, rank: int, start: int, end: int) -> Tensor:
        """Elements ``start`` to ``end`` of one stored rank's flattened slice."""
        if self._mapped > MAPPED_BYTES:
            self._opened.clear()
            self._mapped = 0
        self._mapped += 4 * (end - start)
        try:
            parts = [
                self._open(piece.file).get_slice(f"{kind}/{name}")[
                    max(start - piece.start, 0) : min(end, piece.end) - piece.start
                ]
                for piece in self._pieces.get((rank, name), ())
                if piece.start < end and start < piece.end
            ]
        except SafetensorError as error:
            raise Damaged(f"{self.path}: {kind}/{name} cannot be read ({error})") from error
        found = torch.cat(parts) if len(parts) > 1 else next(iter(parts), torch.empty(0))
        if found.numel() != end - start:
            raise Damaged(f"{self.path}: holds {found.numel()} of {end - start} elements of {kind}/{name}")
        return found

    def _agreed(self, kind: str, parameter: weights.Parameter, start: int, end: int) -> Tensor:
        """Of a parameter that every tensor-parallel rank holds whole: the first rank's copy."""
        copies = [self._flat(kind, parameter.name, rank, start, end) for rank in range(self.tensor_size)]
        return agreed_copy(copies, f"{self.path}: {kind} of {parameter.name}")


def agreed_copy(copies: Sequence[Tensor], name: str) -> Tensor:
    """The first of tensor-parallel ranks' copies; ranks that sum in another order may differ in the last places.

    Raises:
        UserError: a copy differs by more than rounding (``COPY_TOLERANCE``).
    """
    first = copies[0]
    different = [copy for copy in copies[1:] if not torch.equal(first, copy)]
    if not different:
        return first
    largest = max(float((first.double() - copy.double()).abs().nan_to_num(torch.inf).max()) for copy in different)
    share = largest / max(float(first.double().abs().max()), torch.finfo(torch.float64).tiny)
    if not share <= COPY_TOLERANCE:
        raise UserError(
            f"{name} differs between tensor-parallel ranks by {share:.1e} of its largest value, expected equal copies "
            f"(up to {COPY_TOLERANCE:.0e} is taken for rounding)"
        )
    print(
        f"warning: {name} differs between tensor-parallel ranks by {share:.1e} of its largest value, within rounding; "
        "the first rank's copy is used",
        file=sys.stderr,
        flush=True,
    )
    return first
