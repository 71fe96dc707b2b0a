"""fairseq's checkpoint files, read and written without fairseq or omegaconf, and without running code from the file.

A checkpoint's tensors come with its configuration. Recent files hold that as plain dicts; older ones pickle an
``argparse.Namespace`` or omegaconf's ``DictConfig``, whose fields name fairseq's own configuration classes. Such
objects are never made: their names are allow-listed for inert stand-ins that only keep what was pickled, from which the
plain values are then read. Any other object in the file is refused.
"""

from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.files import write_atomically
from digit_ds.safe_load import load_torch

_CONFIGURATION_MODULES = ("omegaconf.", "fairseq.", "fairseq_user.", "typing.")
"""Modules whose pickled objects become stand-ins (``fairseq_user``: the published code's own plug-in)."""
_CONFIGURATION_NAMES = (
    "argparse.Namespace",
    "operator.getitem",  # how typing.Optional[int] is pickled
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
)


class _StandIn:
    """Keeps the arguments and the state of a pickled object; nothing of the object's own code runs."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __new__(cls, *arguments: Any):  # unpickling may skip __init__
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class FairseqCheckpoint(NamedTuple):
    """What a converter needs of a fairseq checkpoint."""

    model: dict[str, Tensor]
    """State dict of the whole fairseq model."""
    cfg: dict[str, Any] | None
    """Configuration by group, as plain JSON values."""
    args: dict[str, Any] | None
    """Flat configuration of older files."""

    def option(self, name: str, default: Any = None) -> Any:
        """An option of the model: ``cfg.model.name``, or ``args.name`` in older files."""
        options = (self.cfg or {}).get("model") or self.args or {}
        return options.get(name, default)


def read_checkpoint(path: Path | str) -> FairseqCheckpoint:
    """Read a fairseq checkpoint onto the CPU, memory-mapped.

    Raises:
        UserError: the file is missing, damaged, holds other objects than tensors, plain values and configurations, or
            is not a fairseq checkpoint.
    """
    path = Path(path)
    found = load_torch(path, allow=_stand_ins(path))
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, Mapping) or not ("cfg" in found or "args" in found):
        keys = ", ".join(str(key) for key in list(found)[:4]) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{path}: holds {keys or 'nothing'}, expected a fairseq checkpoint with 'model' and 'cfg'")
    tensors = {name: value for name, value in model.items() if isinstance(value, Tensor)}
    cfg, args = plain(found.get("cfg")), plain(found.get("args"))
    if not isinstance(cfg, dict | None) or not isinstance(args, dict | None) or not (cfg or args):
        raise UserError(f"{path}: holds no model configuration, expected one in 'cfg' or 'args'")
    return FairseqCheckpoint(tensors, cfg, args)


def write_checkpoint(
    path: Path | str, model: Mapping[str, Tensor], cfg: dict[str, Any] | None, args: dict[str, Any] | None
) -> None:
    """Write a checkpoint as fairseq's trainer does, without optimizer state, atomically."""
    history = {
        "criterion_name": "CE_Loss_LS",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {"best": None},
        "num_updates": 0,
    }
    content = {
        "args": None if args is None else Namespace(**args),
        "cfg": cfg,
        "model": {name: value.contiguous() for name, value in model.items()},
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "version": 2}, "val_loss": None},
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def plain(value: Any) -> Any:
    """A configuration as JSON values: dicts, lists, strings, numbers, booleans and None."""
    if isinstance(value, _StandIn):
        state = value.state
        if not isinstance(state, Mapping):
            return plain(value.arguments[0]) if value.arguments else None  # an Enum member
        for content in ("_content", "_val"):  # omegaconf: containers, values
            if content in state:
                return plain(state[content])
        return plain(dict(state))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _stand_ins(path: Path) -> list[Any]:
    """The allow-list for a file: what it names of the configuration classes above, each as a stand-in."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file, or a damaged one: reading it reports that
        names = ["argparse.Namespace"]
    wanted = [name for name in names if name in _CONFIGURATION_NAMES or name.startswith(_CONFIGURATION_MODULES)]
    # omegaconf's metadata holds an (empty) defaultdict, which is as harmless as a dict.
    return [defaultdict, *((_StandIn, name) for name in wanted)]
