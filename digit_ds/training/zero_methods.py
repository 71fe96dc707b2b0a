"""Methods of DeepSpeed's ZeRO optimizers that are replaced: the host waits for the GPU in none of them.

What the host no longer waits for, the streams of the GPU wait for, each with a function here that says which and why.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from digit_ds.parallel.frameworks import deepspeed, parallel_state
from digit_ds.parallel.topology import Topology
from digit_ds.training.kept_weights import KeptWeights
from digit_ds.training.weight_gather import WeightGather
from digit_ds.training.zero_fields import check


def leave_the_norm(zero: Any) -> None:
    """DeepSpeed does not read the gradient's norm on the host: ``GuardedAdamW`` skips what is not finite on the GPU."""
    module: Any = sys.modules[type(zero).__module__]
    check(module, "is_invalid_grad_norm")
    module.is_invalid_grad_norm = lambda norm: False


def mark_on_the_device(zero: Any) -> None:
    """DeepSpeed sets a norm that is not finite to -1, with a constant that the host copies once the GPU is idle."""

    def mark(input: Tensor, device: Any = None, val: float = -1.0) -> None:
        input.masked_fill_(~input.isfinite(), val)

    name = "mask_nan_or_inf_with_val_inplace"
    check(deepspeed.runtime.utils, name)
    for module in (deepspeed.runtime.utils, sys.modules[type(zero).__module__]):
        if hasattr(module, name):
            setattr(module, name, mark)


def gather_beside_the_forward_pass(zero: Any, gather: WeightGather) -> None:
    """Updated weights are sent while the next forward pass computes; DeepSpeed waits for all of them after the update.

    Each parameter group is gathered by itself. The gradient's norm stays one sum over the ranks, not one a group.
    """
    check(zero, "update_lp_params", "scaled_global_norm", "get_grad_norm_direct")
    check(zero, "averaged_gradients", "params_in_partition")
    module: Any = sys.modules[type(zero).__module__]
    check(module, "all_gather_dp_groups")

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


def reduce_beside_the_host(zero: Any, stream: Any) -> None:
    """After a backward pass the GPU waits for the reductions on ``stream``; DeepSpeed lets the host wait for the GPU.

    ``stream`` is None on a CPU, where nothing runs beside the host.
    """
    check(zero, "independent_gradient_partition_epilogue")
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


def keep_what_is_reduced(zero: Any, stream: Any) -> None:
    """The memory of a gradient on its way is not given to another tensor before ``stream`` has read it.

    DeepSpeed leaves this out for a gradient that is larger than ``reduce_bucket_size``: it is reduced where it is, and
    freed at once on a rank that owns no part of it.
    """
    check(zero, "average_tensor")
    if stream is None or not zero.overlap_comm:
        return
    original = zero.average_tensor

    def average(tensor: Tensor, *arguments: Any) -> None:
        tensor.record_stream(stream)
        original(tensor, *arguments)

    zero.average_tensor = average


def keep_small_weights(zero: Any, device: torch.device) -> None:
    """Weights too small to be given back stay in one place and are brought up to date together."""
    check(zero, "persistent_parameters")
    parameters = zero.persistent_parameters
    if not parameters:
        return
    first = parameters[0]  # DeepSpeed calls its method for all of them
    check(first, "ds_status", "ds_tensor", "ds_shape", "ds_process_group", "all_gather", "partition")
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


def gather_what_is_updated(zero: Any) -> Callable[[], None]:
    """Each update is complete before the next gather of weights reads its parts.

    DeepSpeed gathers on a stream of its own (``overlap_comm``), which waits for no other one: it relies on the host to
    wait for the update. A host that runs ahead would send the weights from before it.

    Returns:
        What else changes the parts calls it afterwards.
    """
    check(zero, "parameter_offload")
    owner, name = zero.parameter_offload, "_DeepSpeedZeRoOffload__allgather_stream"
    check(owner, name)
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


def square_of_norm(gradients: Iterable[tuple[Tensor, Tensor]], topology: Topology, device: torch.device) -> Tensor:
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


def norm_of_parts(zero: Any, topology: Topology, device: torch.device) -> None:
    """The norm of gradients that stage 3 has cut, as DeepSpeed defines it.

    DeepSpeed's own takes the norm of each part by itself, and copies a constant from the host once the GPU is idle.
    What is not finite stays so: DeepSpeed marks it where it combines the groups.
    """
    check(zero, "get_grad_norm_direct", "averaged_gradients")

    def norm(gradients: list[Tensor], params: list[Any], norm_type: int = 2) -> Tensor:
        square = square_of_norm(zip(gradients, params), topology, device)
        dist.all_reduce(square, group=parallel_state.get_data_parallel_group())
        if topology.tensor_size > 1:
            dist.all_reduce(square, group=parallel_state.get_tensor_model_parallel_group())
        return square.sqrt()

    zero.get_grad_norm_direct = norm
