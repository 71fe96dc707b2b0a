"""The state of a DeepSpeed engine under each ZeRO stage: the only file that uses private fields of DeepSpeed.

DeepSpeed has no public access to a rank's own part of the float32 master weights and of the optimizer states. What is
used in its place is checked when the engine is built, so that a version of DeepSpeed that renamed a field is refused
before the first step and not at the first checkpoint.
"""

import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from digit_ds.errors import UserError
from digit_ds.parallel.frameworks import deepspeed, parallel_state
from digit_ds.parallel.topology import Mpu, Topology
from digit_ds.training.kept_weights import KeptWeights
from digit_ds.training.optimizer import GuardedAdamW
from digit_ds.training.weight_gather import WeightGather

View = Callable[[str], Tensor]
"""Kind of state (``weight`` or one of ``GuardedAdamW.state_names``) -> flat view of the live float32 tensor."""


class MissingField(UserError):
    """The installed DeepSpeed lacks a private field that this file reads."""

    def __init__(self, owner: object, name: str) -> None:
        super().__init__(
            f"DeepSpeed {version('deepspeed')} has no field {name} in {type(owner).__name__}, which "
            "digit_ds/training/zero.py uses; install the version in constraints.txt or change that file"
        )


def _check(owner: object, *names: str) -> None:
    """Refuse a DeepSpeed whose object lacks one of these private fields.

    Raises:
        MissingField: names the field and the version.
    """
    for name in names:
        if not hasattr(owner, name):
            raise MissingField(owner, name)


# On CPUs DeepSpeed would compile a shared-memory all-reduce at first use, for minutes; gloo needs no compiler.
_check(deepspeed.ops, "__compatible_ops__")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Partitioner:
    """Cuts single parameters over the data-parallel ranks as stage 3 keeps them, before ``deepspeed.initialize``.

    DeepSpeed's ``zero.Init`` as a context would cut them in the constructors of their modules, without values. Every
    rank calls it for the same parameters in the same order; data rank 0's values count.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """``config`` is the one for ``deepspeed.initialize``."""
        self._config = config
        self._first: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        """Leave this rank's part of ``parameter``; its own data is empty from then on."""
        if self._first is None:
            group = parallel_state.get_data_parallel_group()
            # As deepspeed.initialize begins; without it the configuration would be read as one process's.
            backend = deepspeed.get_accelerator().communication_backend_name()
            deepspeed.init_distributed(backend, dist_init_required=False)
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(holder, data_parallel_group=group, config_dict_or_path=self._config, mpu=Mpu())
            _check(parameter, "convert_to_zero_parameters")
            self._first = parameter
        else:
            self._first.convert_to_zero_parameters(param_list=[parameter])


def _leave_the_norm(zero: Any) -> None:
    """DeepSpeed does not read the gradient's norm on the host: ``GuardedAdamW`` skips what is not finite on the GPU."""
    module: Any = sys.modules[type(zero).__module__]
    _check(module, "is_invalid_grad_norm")
    module.is_invalid_grad_norm = lambda norm: False


def _mark_on_the_device(zero: Any) -> None:
    """DeepSpeed sets a norm that is not finite to -1, with a constant that the host copies once the GPU is idle."""

    def mark(input: Tensor, device: Any = None, val: float = -1.0) -> None:
        input.masked_fill_(~input.isfinite(), val)

    name = "mask_nan_or_inf_with_val_inplace"
    _check(deepspeed.runtime.utils, name)
    for module in (deepspeed.runtime.utils, sys.modules[type(zero).__module__]):
        if hasattr(module, name):
            setattr(module, name, mark)


def _gather_beside_the_forward_pass(zero: Any, gather: WeightGather) -> None:
    """Updated weights are sent while the next forward pass computes; DeepSpeed waits for all of them after the update.

    Each parameter group is gathered by itself. The gradient's norm stays one sum over the ranks, not one a group.
    """
    _check(zero, "update_lp_params", "scaled_global_norm", "get_grad_norm_direct")
    _check(zero, "averaged_gradients", "params_in_partition")
    module: Any = sys.modules[type(zero).__module__]
    _check(module, "all_gather_dp_groups")

    def begin(groups_flat: Any, partitioned_param_groups: Any, dp_process_group: Any, **_: Any) -> None:
        gather.begin(
            dist.all_gather_into_tensor(flat, parts[dist.get_rank(group)], group=group, async_op=True)
            for flat, parts, group in zip(groups_flat, partitioned_param_groups, dp_process_group, strict=True)
        )

    def beside(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            gather.wait()  # what is sent is about to change
            original, module.all_gather_dp_groups = module.all_gather_dp_groups, begin
            try:
                return method(*arguments, **options)
            finally:
                module.all_gather_dp_groups = original

        return run

    def norm(norm_type: int = 2) -> Tensor:
        gradients, parameters = [], []
        for number, owned in enumerate(zero.params_in_partition):
            real = [part for part in zero.averaged_gradients[number] if not getattr(part, "_zero_padding", False)]
            gradients += real[: len(owned)]
            parameters += owned[: len(real)]
        return zero.get_grad_norm_direct(gradients, parameters, norm_type)

    zero.step, zero.update_lp_params = beside(zero.step), beside(zero.update_lp_params)
    zero.scaled_global_norm = norm


def _reduce_beside_the_host(zero: Any, stream: Any) -> None:
    """After a backward pass the GPU waits for the reductions on ``stream``; DeepSpeed lets the host wait for the GPU.

    ``stream`` is None on a CPU, where nothing runs beside the host.
    """
    _check(zero, "independent_gradient_partition_epilogue")
    if stream is None:
        return
    accelerator, original = deepspeed.get_accelerator(), zero.independent_gradient_partition_epilogue

    def epilogue() -> None:
        main = accelerator.current_stream()

        def wait() -> None:
            stream.wait_stream(main)  # without contiguous_gradients DeepSpeed waits before the last reductions
            main.wait_stream(stream)

        accelerator.synchronize = stream.synchronize = wait  # before the methods of their classes
        try:
            original()
        finally:
            del accelerator.synchronize, stream.synchronize

    zero.independent_gradient_partition_epilogue = epilogue


def _keep_what_is_reduced(zero: Any, stream: Any) -> None:
    """The memory of a gradient on its way is not given to another tensor before ``stream`` has read it.

    DeepSpeed leaves this out for a gradient that is larger than ``reduce_bucket_size``: it is reduced where it is, and
    freed at once on a rank that owns no part of it.
    """
    _check(zero, "average_tensor")
    if stream is None or not zero.overlap_comm:
        return
    original = zero.average_tensor

    def average(tensor: Tensor, *arguments: Any) -> None:
        tensor.record_stream(stream)
        original(tensor, *arguments)

    zero.average_tensor = average


def _keep_small_weights(zero: Any, device: torch.device) -> None:
    """Weights too small to be given back stay in one place and are brought up to date together."""
    _check(zero, "persistent_parameters")
    parameters = zero.persistent_parameters
    if not parameters:
        return
    first = parameters[0]  # DeepSpeed calls its method for all of them
    _check(first, "ds_status", "ds_tensor", "ds_shape", "ds_process_group", "all_gather", "partition")
    status = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus
    parts, shapes = [parameter.ds_tensor for parameter in parameters], [parameter.ds_shape for parameter in parameters]
    kept, original = KeptWeights(parts, shapes, first.ds_process_group, device), first.all_gather

    def gather(param_list: Any = None, **options: Any) -> None:
        if param_list is not parameters:
            original(param_list, **options)
            return
        kept.gather()
        for parameter, whole in zip(parameters, kept.whole, strict=True):
            if parameter.data_ptr() != whole.data_ptr():
                parameter.data = whole
            parameter.ds_status = status.AVAILABLE

    first.all_gather = gather
    for parameter, whole in zip(parameters, kept.whole, strict=True):
        _leave_in_place(parameter, whole, status.NOT_AVAILABLE)


def _leave_in_place(parameter: Any, whole: Tensor, missing: Any) -> None:
    """What DeepSpeed does to give a parameter's memory back leaves the data that is ``whole``."""
    original = parameter.partition

    def partition(param_list: Any = None, **options: Any) -> None:
        if param_list is None and not options.get("has_been_updated") and parameter.data_ptr() == whole.data_ptr():
            parameter.ds_status = missing
        else:
            original(param_list, **options)

    parameter.partition = partition


def _gather_what_is_updated(zero: Any) -> Callable[[], None]:
    """Each update is complete before the next gather of weights reads its parts.

    DeepSpeed gathers on a stream of its own (``overlap_comm``), which waits for no other one: it relies on the host to
    wait for the update. A host that runs ahead would send the weights from before it.

    Returns:
        What else changes the parts calls it afterwards.
    """
    _check(zero, "parameter_offload")
    owner, name = zero.parameter_offload, "_DeepSpeedZeRoOffload__allgather_stream"
    _check(owner, name)
    update = zero.step

    def changed() -> None:
        if (stream := getattr(owner, name)) is not None:  # None on a CPU, where nothing runs beside the host
            stream.wait_stream(deepspeed.get_accelerator().current_stream())

    def step(*arguments: Any, **options: Any) -> None:
        update(*arguments, **options)
        changed()

    zero.step = step
    changed()  # by what built them
    return changed


def _square_of_norm(gradients: Iterable[tuple[Tensor, Tensor]], topology: Topology, device: torch.device) -> Tensor:
    """Float64 square of the norm of what this rank counts, from pairs of a gradient and its parameter.

    Each slice is counted once, replicated parameters once over the tensor-parallel group.
    """
    counted = [
        gradient
        for gradient, parameter in gradients
        if getattr(parameter, "tensor_model_parallel", False) or topology.tensor_rank == 0
    ]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(counted)).double().square().sum()


def _norm_of_parts(zero: Any, topology: Topology, device: torch.device) -> None:
    """The norm of gradients that stage 3 has cut, as DeepSpeed defines it.

    DeepSpeed's own takes the norm of each part by itself, and copies a constant from the host once the GPU is idle.
    What is not finite stays so: DeepSpeed marks it where it combines the groups.
    """
    _check(zero, "get_grad_norm_direct", "averaged_gradients")

    def norm(gradients: list[Tensor], params: list[Any], norm_type: int = 2) -> Tensor:
        square = _square_of_norm(zip(gradients, params), topology, device)
        dist.all_reduce(square, group=parallel_state.get_data_parallel_group())
        if topology.tensor_size > 1:
            dist.all_reduce(square, group=parallel_state.get_tensor_model_parallel_group())
        return square.sqrt()

    zero.get_grad_norm_direct = norm


class Given(NamedTuple):
    """What a state is built around."""

    zero: Any
    """DeepSpeed's optimizer around ``optimizer``."""
    optimizer: GuardedAdamW
    parameters: list[Any]
    """The model's."""
    topology: Topology
    device: torch.device
    gather: WeightGather | None
    """Stage 2's sending of updated weights, where it goes on during the forward pass."""


class ZeroState(Protocol):
    """What a rank owns of the state, and the norm of the gradient. A class for each group of stages."""

    partitions_weights: bool
    """Whether the model's own parameters are empty between layers (stage 3)."""

    def __init__(self, given: Given) -> None: ...

    def global_norm(self) -> Tensor | float:
        """Norm of the whole model's gradient, needed within an update."""

    def last_norm(self) -> Tensor | float:
        """The same after the update; negative or not finite: skipped."""

    def create(self) -> None:
        """Make the optimizer's states, which otherwise exist from the first step on."""

    def view(self, parameter: Any) -> tuple[int, View | None]:
        """First element and view of this rank's part of a parameter's flattened state; None: it owns nothing."""

    def refresh_model(self) -> None:
        """Bring what every rank's forward pass reads up to the changed state."""


class _WholeState:
    """Stage 0: every data-parallel rank holds everything, and data rank 0 owns it."""

    partitions_weights = False

    def __init__(self, given: Given) -> None:
        self._optimizer, self._parameters = given.optimizer, given.parameters
        self._topology, self._device = given.topology, given.device

    def global_norm(self) -> Tensor:
        used = [(parameter.grad, parameter) for parameter in self._parameters if parameter.grad is not None]
        square = _square_of_norm(used, self._topology, self._device)
        dist.all_reduce(square, group=parallel_state.get_tensor_model_parallel_group())
        return square.sqrt().float()

    def last_norm(self) -> Tensor | float:
        return self._optimizer.last_norm

    def create(self) -> None:
        self._optimizer.create_state()

    def view(self, parameter: Any) -> tuple[int, View | None]:
        if self._topology.data_rank:
            return 0, None
        return 0, lambda kind: self._whole(parameter, kind).view(-1)

    def refresh_model(self) -> None:
        group = parallel_state.get_data_parallel_group()
        owner = dist.get_process_group_ranks(group)[0]
        for parameter in self._parameters:
            exists = parameter in self._optimizer.state  # not before the first step of a run that starts from a model
            for kind in ("weight", *(self._optimizer.state_names if exists else ())):
                dist.broadcast(self._whole(parameter, kind), owner, group=group)

    def _whole(self, parameter: Tensor, kind: str) -> Tensor:
        return parameter.data if kind == "weight" else self._optimizer.state[parameter][kind]


class _PartitionedState:
    """Stages 1 and 2: data-parallel ranks own flat parts of the masters and optimizer states."""

    partitions_weights = False

    def __init__(self, given: Given) -> None:
        zero, optimizer, parameters, *_, gather = given
        self._zero, self._optimizer = zero, optimizer
        _check(zero, "_lazy_init_hp_params_optimizer_state", "update_lp_params")
        _mark_on_the_device(zero)
        self._gather = gather
        if gather is not None:
            _gather_beside_the_forward_pass(zero, gather)
            optimizer.create_state()  # DeepSpeed links the states of all groups after the update of the first
        if hasattr(zero, "reduction_stream"):
            _reduce_beside_the_host(zero, zero.reduction_stream)
            _keep_what_is_reduced(zero, zero.reduction_stream)
        else:  # stage 1 in bf16
            _leave_the_norm(zero)
        for parameter in parameters:
            _check(parameter, "_hp_mapping")
            if parameter._hp_mapping is not None:
                _check(parameter._hp_mapping, "get_hp_fragment", "lp_fragment_address")
                _check(parameter._hp_mapping.lp_fragment_address, "start")

    def global_norm(self) -> Tensor | float:
        _check(self._zero, "_global_grad_norm")  # here, because under stage 1 in bf16 the first step makes it
        return self._zero._global_grad_norm

    last_norm = global_norm

    def create(self) -> None:
        self._optimizer.create_state()
        self._zero._lazy_init_hp_params_optimizer_state()

    def view(self, parameter: Any) -> tuple[int, View | None]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, None
        start = mapping.lp_fragment_address.start
        return start, lambda kind: mapping.get_hp_fragment(None if kind == "weight" else kind)

    def refresh_model(self) -> None:
        self._zero.update_lp_params()
        if self._gather is not None:
            self._gather.wait()


class _PartitionedWeights:
    """Stage 3: as 1 and 2, each parameter cut by itself; the model's weights are parts as well."""

    partitions_weights = True

    def __init__(self, given: Given) -> None:
        zero, optimizer, parameters, topology, device, _ = given
        self._zero, self._optimizer = zero, optimizer
        _check(zero, "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "_get_fp32_opt_state_partition")
        _check(zero, "checkpoint_event_prologue", "checkpoint_event_epilogue", "_global_grad_norm")
        _check(zero, "reduce_and_partition_stream")
        _leave_the_norm(zero)
        _mark_on_the_device(zero)
        _norm_of_parts(zero, topology, device)
        _reduce_beside_the_host(zero, zero.reduce_and_partition_stream)
        _keep_small_weights(zero, device)
        self._changed = _gather_what_is_updated(zero)
        for parameter in parameters:
            _check(parameter, "ds_process_group", "ds_numel", "partition_numel")

    def global_norm(self) -> Tensor | float:
        return self._zero._global_grad_norm

    last_norm = global_norm

    def create(self) -> None:
        self._optimizer.create_state(self._zero.fp32_partitioned_groups_flat)

    def view(self, parameter: Any) -> tuple[int, View | None]:
        rank, size = dist.get_rank(parameter.ds_process_group), parameter.partition_numel()
        length = min(size, parameter.ds_numel - rank * size)  # the last part is padded
        if length <= 0:
            return 0, None
        # DeepSpeed's public accessor of this partition copies it to the device under offload.
        part = self._zero._get_fp32_opt_state_partition
        return rank * size, lambda kind: part(parameter, False, None if kind == "weight" else kind)[0][:length]

    def refresh_model(self) -> None:
        self._zero.checkpoint_event_prologue()
        masters = self._zero.fp32_partitioned_groups_flat
        for model, master in zip(self._zero.fp16_partitioned_groups_flat, masters):
            model.data.copy_(master.data)
        self._changed()
        self._zero.checkpoint_event_epilogue()


STATES: dict[int, type[ZeroState]] = {
    0: _WholeState,
    1: _PartitionedState,
    2: _PartitionedState,
    3: _PartitionedWeights,
}
"""Stage -> how its state is reached."""
