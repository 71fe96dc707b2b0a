"""Reading PyTorch checkpoint files that somebody else wrote, without running what may be hidden in them."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from digit_ds.errors import UserError

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
            warnings.simplefilter("ignore")  # torch warns of pickles that are none of its own before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head == _ZIP_MAGIC)
    except Exception as error:  # a damaged pickle raises anything, from EOFError to AttributeError
        raise UserError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        name = foreign[1].rstrip(".")
        return f"holds a Python object ({name}) that could run code, expected a checkpoint of tensors and plain values"
    return "is not a PyTorch checkpoint, or a damaged or truncated one"


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
