"""Reading checkpoints and arrays from others, without running code that they may contain."""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from digit_ds.errors import UserError

MAPPED_BYTES = 1 << 26
"""Read so much of a mapped file, then close and open it again: pages that were read count as the process's memory."""
_ZIP_MAGIC = b"PK\x03\x04"


def load_torch(path: Path | str, allow: Sequence[type | Callable | tuple[Any, str]] = ()) -> Any:
    """Read a ``torch.save`` file onto the CPU with ``weights_only=True``.

    Tensors of the zip format (all files since PyTorch 1.6) are memory-mapped: they cost memory only once they are
    touched, and changing one in place changes a private copy, never the file.

    Args:
        path: the checkpoint.
        allow: classes and functions, beyond tensors and plain containers, that the file may hold, each as itself or
            as ``(object, "module.name as written in the file")``. Everything else is refused.

    Raises:
        UserError: the file is missing, damaged or cut short, is not a PyTorch checkpoint, or holds other objects.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a PyTorch checkpoint") from error
    try:
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about foreign pickles before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head == _ZIP_MAGIC)
    except Exception as error:  # a damaged pickle raises anything, from EOFError to AttributeError
        raise UserError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        name = foreign[1].rstrip(".")
        return f"holds a Python object ({name}) that could run code, expected a checkpoint of tensors and plain values"
    return "is not a PyTorch checkpoint, or a damaged or truncated one"


def is_safetensors(path: Path | str) -> bool:
    """Whether a file begins as safetensors files do: eight bytes of length, then a JSON object. False if unreadable."""
    try:
        with Path(path).open("rb") as stream:
            return stream.read(9)[8:] == b"{"
    except OSError:
        return False


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU; a missing or damaged one raises ``UserError``."""
    with open_tensors(path):
        return load_file(path)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, to read single tensors of; a missing or damaged one raises ``UserError``."""
    if not path.is_file():
        raise UserError(f"{path}: does not exist, expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not a safetensors file, or a damaged or truncated one ({reason})") from error


def load_npy(path: Path | str, expected: str, mmap: bool = False) -> np.ndarray:
    """Read a ``.npy`` file, memory-mapped with ``mmap``; never a pickle.

    Raises:
        UserError: it cannot be read, is damaged, or is something else, such as an ``.npz``; says what was ``expected``.
    """
    array = _load_numpy(path, expected, lambda found: found, ".npy file of numbers", "r" if mmap else None)
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: is an archive of arrays, expected {expected}")
    return array


def load_npz(path: Path | str, *names: str) -> dict[str, np.ndarray]:
    """Read the arrays ``names`` (none named: all) of an ``.npz``; never a pickle.

    Raises:
        UserError: the file cannot be read, is damaged or not an ``.npz``, or lacks one of them.
    """

    def read(found: Any) -> dict[str, np.ndarray]:
        if isinstance(found, np.ndarray):
            raise UserError(f"{path}: is a single array, expected {expected}")
        with found as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise UserError(f"{path}: holds no array {missing[0]!r}, expected {', '.join(names)}")
            return {name: archive[name] for name in names or archive.files}

    expected = f"an .npz with {' and '.join(map(repr, names))}" if names else "an .npz of arrays"
    return _load_numpy(path, expected, read, ".npz of arrays of numbers")


def _load_numpy(path: Path | str, expected: str, read: Callable[[Any], Any], kind: str, mmap_mode: Any = None) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(np.load(path, mmap_mode=mmap_mode, allow_pickle=False))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected {expected}") from error
    except Exception as error:  # a damaged archive raises anything, from BadZipFile to zlib.error and MemoryError
        raise UserError(f"{path}: is not a complete {kind}, expected {expected}") from error


def load_strictly(module: torch.nn.Module, state: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Give ``module`` the tensors of ``state`` as they are (``assign``), names and shapes agreeing exactly.

    Raises:
        UserError: they do not; names ``source`` and the first tensor that differs.
    """
    expected = {name: list(value.shape) for name, value in module.state_dict().items()}
    found = {name: list(value.shape) for name, value in state.items()}
    wrong = [name for name in (*expected, *(found.keys() - expected.keys())) if found.get(name) != expected.get(name)]
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more tensors differ)" if len(wrong) > 1 else ""
        raise UserError(
            f"{source}: tensor {name} is {_shape(found.get(name))}, expected {_shape(expected.get(name))}{more}"
        )
    module.load_state_dict(state, strict=True, assign=True)


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"
