"""A model cut for tensor parallelism: a directory from which each Megatron rank reads its own part.

``config.json`` is that of the released model plus ``tensor_parallel``; ``tensor_rank_00_of_02.safetensors`` holds what
rank 0 of 2 holds in memory, vocabulary padding included. These are weights alone: a run that starts from them has a
fresh optimizer.
"""

from collections import deque
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.files import write_json
from digit_ds.model.released import (
    CONFIG,
    WEIGHTS,
    ReleasedModel,
    read_config,
    read_model,
    refuse_existing,
    save_model,
)
from digit_ds.model.settings import FromMegatron, ToMegatron
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.tensor_file import whole, write_tensors
from digit_ds.model.weights import (
    State,
    check_tensor_size,
    parameters,
    shard,
    shard_parameter,
    shard_shape,
    unshard,
    unshard_parameter,
)
from digit_ds.safe_load import MAPPED_BYTES, open_tensors, read_tensors

TENSOR_PARALLEL = "tensor_parallel"


def rank_file(rank: int, tensor_size: int) -> str:
    """File name of one rank's part."""
    return f"tensor_rank_{rank:02d}_of_{tensor_size:02d}.safetensors"


def write_partitioned(
    directory: Path | str,
    spec: TransformerSpec,
    state: Mapping[str, Tensor],
    provenance: dict[str, Any],
    tensor_size: int,
) -> None:
    """Cut a full state dict for ``tensor_size`` ranks and write it; ``config.json`` comes last.

    Raises:
        UserError: the directory holds a model already, or the size does not divide the model.
    """
    directory = Path(directory)
    refuse_existing(directory)
    check_tensor_size(spec, tensor_size)
    for rank in range(tensor_size):
        part = shard(state, spec, tensor_size, rank)
        write_tensors(directory / rank_file(rank, tensor_size), {name: whole(value) for name, value in part.items()})
    content = {"spec": spec.to_dict(), "provenance": provenance, TENSOR_PARALLEL: tensor_size}
    write_json(directory / CONFIG, content)


def read_partitioned(directory: Path | str) -> ReleasedModel:
    """Join the parts of all ranks to the whole model, dtypes as stored.

    Raises:
        UserError: it is not such a directory, or a part is missing, damaged or of another model.
    """
    directory = Path(directory)
    spec, provenance, config = read_config(directory)
    tensor_size = _tensor_size(directory, config)
    parts = [_read_part(directory, spec, tensor_size, rank) for rank in range(tensor_size)]
    return ReleasedModel(spec, unshard(parts, spec), provenance)


def to_megatron(settings: ToMegatron) -> None:
    """Cut a released model directory for tensor-parallel ranks, to train from; see ``write_partitioned``."""
    model = read_model(settings.model)
    write_partitioned(settings.out, model.spec, model.state, model.provenance, settings.tensor_parallel)


def from_megatron(settings: FromMegatron) -> None:
    """Join the parts of all ranks to a released model directory; see ``read_partitioned``."""
    save_model(settings.out, *read_partitioned(settings.parts))


class ShardReader:
    """One rank's weights to start training from, out of a released or a partitioned model directory of any size.

    A directory cut for the same size costs this rank only its own file.

    Raises:
        UserError: a file is missing, damaged or of another model, or the size does not divide the model. All of this
            is found before the first reading.
    """

    def __init__(self, directory: Path | str, tensor_size: int, rank: int) -> None:
        directory = Path(directory)
        self.spec, _, config = read_config(directory)
        check_tensor_size(self.spec, tensor_size)
        self._tensor_size, self._rank = tensor_size, rank
        self._own = config.get(TENSOR_PARALLEL) == tensor_size
        self._paths = [directory / rank_file(rank, tensor_size)] if self._own else weight_files(directory)
        with self._opened() as files:
            for path, file in zip(self._paths, files):
                names = file.keys()
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                _check_shapes(path, shapes, self.spec, config)

    @contextmanager
    def _opened(self) -> Iterator[list[Any]]:
        with ExitStack() as stack:
            yield [stack.enter_context(open_tensors(path)) for path in self._paths]

    def read(self, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """The parameters of these names, one whole at a time: tensors of ``shard_shape``, dtypes as stored."""
        remaining = deque(parameter for parameter in parameters(self.spec) if parameter.name in names)
        while remaining:
            with self._opened() as files:
                read = 0
                while remaining and read < MAPPED_BYTES:
                    parameter = remaining.popleft()
                    pieces = [file.get_tensor(parameter.name) for file in files]
                    read += sum(piece.nbytes for piece in pieces)
                    if self._own:
                        yield parameter.name, pieces[0]
                    else:
                        whole = unshard_parameter(pieces, parameter)
                        yield parameter.name, shard_parameter(whole, parameter, self._tensor_size, self._rank)
                    del pieces


def weight_files(directory: Path | str) -> list[Path]:
    """The files with the weights of a released or a partitioned model directory, in the order of the ranks."""
    directory = Path(directory)
    _, _, config = read_config(directory)
    if TENSOR_PARALLEL not in config:
        return [directory / WEIGHTS]
    tensor_size = _tensor_size(directory, config)
    return [directory / rank_file(rank, tensor_size) for rank in range(tensor_size)]


def _tensor_size(directory: Path, config: Mapping[str, Any]) -> int:
    tensor_size = config.get(TENSOR_PARALLEL)
    if not isinstance(tensor_size, int) or tensor_size < 1:
        raise UserError(f"{directory / CONFIG}: {TENSOR_PARALLEL} is {tensor_size!r}, expected a number of ranks")
    return tensor_size


def _read_part(directory: Path, spec: TransformerSpec, tensor_size: int, rank: int) -> State:
    path = directory / rank_file(rank, tensor_size)
    part = read_tensors(path)
    _check_shapes(
        path, {name: tuple(value.shape) for name, value in part.items()}, spec, {TENSOR_PARALLEL: tensor_size}
    )
    return part


def _check_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], spec: TransformerSpec, config: Mapping[str, Any]
) -> None:
    """Refuse a file that does not hold the parameters of ``spec`` as ``config`` says they are cut."""
    for parameter in parameters(spec):
        cut = config.get(TENSOR_PARALLEL)
        expected = parameter.shape if cut is None else shard_shape(parameter, cut)
        if (found := shapes.get(parameter.name)) != expected:
            held = "is missing" if found is None else f"has shape {list(found)}"
            raise UserError(f"{path}: tensor {parameter.name!r} {held}, expected {list(expected)} by its config")
