"""The released model directory: ``config.json`` (sizes and provenance) beside ``model.safetensors``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from digit_ds import hub
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.tensor_file import Content, whole, write_tensors
from digit_ds.model.weights import State, check_state
from digit_ds.safe_load import read_tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


class ReleasedModel(NamedTuple):
    """What a released model directory holds."""

    spec: TransformerSpec
    state: State
    provenance: dict[str, Any]


def located(model: Path | str) -> Path:
    """The directory of a model, which may be named by its repository, ``hf://OWNER/NAME[@REVISION]``."""
    return hub.located(model, (CONFIG, WEIGHTS))


def save_model(
    directory: Path | str, spec: TransformerSpec, state: Mapping[str, Tensor], provenance: dict[str, Any]
) -> None:
    """Write a released model directory; dtypes stay as they are.

    ``config.json`` comes last, so a directory that has one is complete. A directory that holds a model is refused.

    Raises:
        UserError: the directory holds a model already, or ``state`` does not fit ``spec``.
    """
    refuse_existing(Path(directory))
    check_state(state, spec, str(directory))
    write_model(directory, spec, {name: whole(value) for name, value in state.items()}, provenance)


def write_model(
    directory: Path | str, spec: TransformerSpec, contents: Mapping[str, Content], provenance: dict[str, Any]
) -> None:
    """:func:`save_model` of the parameters of ``spec``, each read when it is written.

    Raises:
        UserError: the directory holds a model already.
    """
    directory = Path(directory)
    refuse_existing(directory)
    write_tensors(directory / WEIGHTS, contents)
    write_json(directory / CONFIG, {"spec": spec.to_dict(), "provenance": provenance})


def read_model(directory: Path | str) -> ReleasedModel:
    """Read a released model directory, or ``hf://OWNER/NAME``, onto the CPU, dtypes as stored.

    Raises:
        UserError: it is not such a directory, or a file in it is damaged or does not fit the other.
    """
    directory = located(directory)
    spec, provenance, _ = read_config(directory)
    state = read_tensors(directory / WEIGHTS)
    check_state(state, spec, str(directory / WEIGHTS))
    return ReleasedModel(spec, state, provenance)


def read_config(directory: Path) -> tuple[TransformerSpec, dict[str, Any], dict[str, Any]]:
    """The spec, the provenance and the whole of a directory's ``config.json``."""
    if not (directory / CONFIG).is_file():
        if not directory.exists():
            found = "does not exist"
        elif directory.is_dir():
            found = f"has no {CONFIG}"
        else:
            found = "is a file"
        raise UserError(f"{directory}: {found}, expected a model directory with {CONFIG} and {WEIGHTS}")
    source = directory / CONFIG
    config = read_json(source)
    if not isinstance(config, dict) or not isinstance(config.get("spec"), dict):
        raise UserError(f"{source}: has no 'spec' mapping, expected the configuration of a released model")
    provenance = config.get("provenance", {})
    if not isinstance(provenance, dict):
        raise UserError(f"{source}: 'provenance' is {type(provenance).__name__}, expected a mapping")
    return TransformerSpec.from_dict(config["spec"], str(source)), provenance, config


def refuse_existing(directory: Path) -> None:
    """Refuse to write over a model."""
    if directory.is_file():
        raise UserError(f"{directory}: is a file, expected a directory to write the model into")
    if (directory / CONFIG).exists():
        raise UserError(f"{directory}: already holds a model ({CONFIG}), expected a new or empty directory")
