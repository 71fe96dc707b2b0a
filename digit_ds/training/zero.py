"""The state of a DeepSpeed engine under each ZeRO stage.

DeepSpeed has no public access to a rank's own part of the float32 master weights and of the optimizer states. Only this
file and ``zero_methods.py`` use private fields of DeepSpeed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from digit_ds.parallel.frameworks import deepspeed, parallel_state
from digit_ds.parallel.topology import Mpu, Topology
from digit_ds.training.optimizer import GuardedAdamW
from digit_ds.training.weight_gather import WeightGather
from digit_ds.training.zero_fields import check
from digit_ds.training.zero_methods import (
    gather_beside_the_forward_pass,
    gather_what_is_updated,
    keep_small_weights,
    keep_what_is_reduced,
    leave_the_norm,
    mark_on_the_device,
    norm_of_parts,
    reduce_beside_the_host,
    square_of_norm,
)

View = Callable[[str], Tensor]
"""Kind of state (``weight`` or one of ``GuardedAdamW.state_names``) -> flat view of the live float32 tensor."""


# On CPUs DeepSpeed would compile a shared-memory all-reduce at first use, for minutes; gloo needs no compiler.
check(deepspeed.ops, "__compatible_ops__")
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
            check(parameter, "convert_to_zero_parameters")
            self._first = parameter
        else:
            self._first.convert_to_zero_parameters(param_list=[parameter])


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
        square = square_of_norm(used, self._topology, self._device)
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
        check(zero, "_lazy_init_hp_params_optimizer_state", "update_lp_params")
        mark_on_the_device(zero)
        self._gather = gather
        if gather is not None:
            gather_beside_the_forward_pass(zero, gather)
            optimizer.create_state()  # DeepSpeed links the states of all groups after the update of the first
        if hasattr(zero, "reduction_stream"):
            reduce_beside_the_host(zero, zero.reduction_stream)
            keep_what_is_reduced(zero, zero.reduction_stream)
        else:  # stage 1 in bf16
            leave_the_norm(zero)
        for parameter in parameters:
            check(parameter, "_hp_mapping")
            if parameter._hp_mapping is not None:
                check(parameter._hp_mapping, "get_hp_fragment", "lp_fragment_address")
                check(parameter._hp_mapping.lp_fragment_address, "start")

    def global_norm(self) -> Tensor | float:
        check(self._zero, "_global_grad_norm")  # here, because under stage 1 in bf16 the first step makes it
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
        check(zero, "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "_get_fp32_opt_state_partition")
        check(zero, "checkpoint_event_prologue", "checkpoint_event_epilogue", "_global_grad_norm")
        check(zero, "reduce_and_partition_stream")
        leave_the_norm(zero)
        mark_on_the_device(zero)
        norm_of_parts(zero, topology, device)
        reduce_beside_the_host(zero, zero.reduce_and_partition_stream)
        keep_small_weights(zero, device)
        self._changed = gather_what_is_updated(zero)
        for parameter in parameters:
            check(parameter, "ds_process_group", "ds_numel", "partition_numel")

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
