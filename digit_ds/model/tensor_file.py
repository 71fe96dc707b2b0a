"""Writing safetensors files piece by piece, so that a model need not be in memory to be written.

The format is eight bytes of length, a JSON header and the tensors' bytes one after the other
(https://huggingface.co/docs/safetensors). The header follows from dtypes and shapes alone. A file is byte for byte the
one that ``safetensors.torch.save_file`` writes.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.files import write_atomically

_METADATA = {"format": "pt"}
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
"""Names in the header. Tensors of the last dtype come first in a file: all are aligned in this order."""


class Content(NamedTuple):
    """A tensor that is read when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Its elements in order, in tensors of any shape."""


def whole(tensor: Tensor) -> Content:
    """A tensor that is in memory."""
    return Content(tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def write_tensors(path: Path, contents: Mapping[str, Content]) -> None:
    """Write a safetensors file atomically; one piece of one tensor is held at a time.

    Raises:
        UserError: it cannot be written, or the format has no name for a dtype.
    """
    for name, content in contents.items():
        if content.dtype not in _DTYPES:
            raise UserError(
                f"{path}: cannot hold {name}, which is {content.dtype}, expected {', '.join(map(str, _DTYPES))}"
            )

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            for part in _parts(contents):
                stream.write(part)

    write_atomically(path, write)


def holds(path: Path, contents: Mapping[str, Content]) -> bool:
    """Whether a file is the one that :func:`write_tensors` would write."""
    try:
        with path.open("rb") as stream:
            return all(stream.read(len(part)) == part for part in _parts(contents)) and not stream.read(1)
    except FileNotFoundError:
        return False


def _parts(contents: Mapping[str, Content]) -> Iterator[memoryview | bytes]:
    """The bytes of a file, piece by piece."""
    ranks = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
    ordered = dict(sorted(contents.items(), key=lambda item: (-ranks[item[1].dtype], item[0])))
    yield _header(ordered)
    for name, content in ordered.items():
        written = 0
        for piece in content.pieces():
            assert piece.dtype == content.dtype, f"{name} is {piece.dtype}"
            part = piece.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
            written += len(part)
            yield part
        assert written == _size(content), f"{name} has {written} bytes, expected {_size(content)}"


def _size(content: Content) -> int:
    """Bytes of a tensor."""
    return math.prod(content.shape) * content.dtype.itemsize


def _header(contents: Mapping[str, Content]) -> bytes:
    """The length and the JSON, padded with spaces so that the tensors begin at a multiple of eight bytes."""
    entries: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for name, content in contents.items():
        begin, end = end, end + _size(content)
        entries[name] = {"dtype": _DTYPES[content.dtype], "shape": content.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
