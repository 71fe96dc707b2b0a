"""Collectives over the tensor-parallel group that autograd and torch.compile can trace.

Megatron-core's own ones break the compiler's graph. Each function here is a pair of conjugate operations, as in
Megatron-LM (arXiv 1909.08053; with rows split over the ranks, arXiv 2205.05198): an identity forward is an all-reduce
backward, an all-gather forward is a reduce-scatter backward.

Shapes: ``R`` rows, the first dimension, split over ``n`` ranks in the order of the ranks; R must be a multiple of n.
Tensors are floating point of any dtype, which results keep. All ranks of the group must call the same function with
tensors of equal shape and dtype; the model-parallel groups of Megatron-core must be initialised.
"""

import os
import socket
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from digit_ds.parallel.frameworks import parallel_state

_OPS = torch.ops._c10d_functional


def size() -> int:
    """Number n of ranks in the tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_world_size()


def _name() -> str:
    return parallel_state.get_tensor_model_parallel_group().group_name


def _sum(x: Tensor, group: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_reduce(x.contiguous(), "sum", group))


def _gather(x: Tensor, ranks: int, group: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_gather_into_tensor(x.contiguous(), ranks, group))


def _reduce_scatter(x: Tensor, ranks: int, group: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.reduce_scatter_tensor(x.contiguous(), "sum", ranks, group))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad, ctx.group), None


class _CopyAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *parameters):
        ctx.group = group
        return tuple(x.view_as(x) for x in parameters)

    @staticmethod
    def backward(ctx, *grads):
        summed = _sum(torch.cat([grad.flatten() for grad in grads]), ctx.group)
        parts = summed.split([grad.numel() for grad in grads])
        return None, *(part.view(grad.shape) for part, grad in zip(parts, grads))


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _sum(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _ColumnProduct(torch.autograd.Function):
    """The all-reduce of the input's gradient overlaps with the computation of the weight's gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, ranks, group, sequence, pieces):
        ctx.ranks, ctx.group, ctx.sequence = ranks, group, sequence
        if sequence:
            x = _gather(x, ranks, group)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        if bias is None or not pieces:
            return torch.nn.functional.linear(x, weight, bias)
        # The compiler finds only products without a bias. It would join the two again, were it not for the views.
        parts = torch.nn.functional.linear(x, weight).unflatten(-1, (ranks, -1))
        return (parts + bias.view(ranks, -1)).flatten(-2)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        product = (grad @ weight).contiguous()
        if ctx.sequence:
            sent = _OPS.reduce_scatter_tensor(product, "sum", ctx.ranks, ctx.group)
        else:
            sent = _OPS.all_reduce(product, "sum", ctx.group)
        rows = grad.flatten(0, -2)
        of_weight = rows.T @ x.flatten(0, -2)
        of_bias = rows.sum(0) if ctx.biased else None
        return _OPS.wait_tensor(sent), of_weight, of_bias, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, group):
        ctx.ranks, ctx.group = ranks, group
        return _reduce_scatter(x, ranks, group)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.ranks, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, group):
        ctx.ranks, ctx.group = ranks, group
        return own_rows(x).clone()

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.ranks, ctx.group), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, group):
        return _gather(x, ranks, group)

    @staticmethod
    def backward(ctx, grad):
        return own_rows(grad).contiguous(), None, None


def travels_in_pieces(device: torch.device) -> bool:
    """Whether gathers and reduce-scatters of compiled layers can be cut into pieces that travel beside the products.

    PyTorch's compiler does so (``micro_pipeline_tp``, "asynchronous tensor parallelism") over memory that the GPUs of
    the group share: they must reach each other, on one host. All ranks of the group call this, and get one answer.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if device.type != "cuda" or group.size() == 1:
        return False
    hosts: list[Any] = [None] * group.size()
    dist.all_gather_object(hosts, (socket.gethostname(), os.environ.get("NCCL_P2P_DISABLE", "0")), group)
    if len(set(hosts)) > 1 or hosts[0][1] != "0":
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of PyTorch do without
        symmetric_memory.enable_symm_mem_for_group(group.group_name)
    try:
        symmetric_memory.get_symm_mem_workspace(group.group_name, 1)
        shared = 1
    except RuntimeError:  # a container or driver that does not let processes share device memory
        shared = 0
    answer = torch.tensor([shared], device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN, group)
    return bool(answer.item())


def own_rows(x: Tensor) -> Tensor:
    """This rank's rows [R / n, ...] of ``x`` [R, ...], which every rank holds whole; a view."""
    count = x.shape[0] // size()
    return x.narrow(0, parallel_state.get_tensor_model_parallel_rank() * count, count)


def first_row(x: Tensor) -> int:
    """Index, among the R rows of all ranks, of the first of this rank's rows ``x`` [R / n, ...]."""
    return parallel_state.get_tensor_model_parallel_rank() * x.shape[0]


def copy(x: Tensor) -> Tensor:
    """``x`` [...] itself, which the ranks use differently afterwards; backward: all-reduce (sum) of the gradient."""
    return _Copy.apply(x, _name())


def copy_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    """:func:`copy` of several small tensors with one reduction."""
    return _CopyAll.apply(_name(), *tensors)


def reduce(x: Tensor) -> Tensor:
    """All-reduce (sum) of ``x`` [...], which all ranks use identically afterwards; backward: identity."""
    return _Reduce.apply(x, _name())


def column_product(x: Tensor, weight: Tensor, bias: Tensor | None, sequence: bool, pieces: bool = False) -> Tensor:
    """``linear(x, weight, bias)`` with this rank's part of the output features.

    Args:
        x: [..., I], equal on all ranks; with ``sequence`` this rank's rows [R / n, ..., I] of it.
        weight: [O / n, I], this rank's rows of the weight.
        bias: [O / n], or None.
        sequence: whether the rows of ``x`` are gathered first (sequence parallelism).
        pieces: whether the rows are to arrive in pieces, see :func:`travels_in_pieces`.

    Returns:
        [..., O / n] for all rows. Backward: the gradient of ``x`` is summed over the ranks, with ``sequence``
        reduce-scattered to this rank's rows.
    """
    return _ColumnProduct.apply(x, weight, bias, size(), _name(), sequence, pieces)


def reduce_scatter(x: Tensor) -> Tensor:
    """This rank's rows [R / n, ...] of the sum of ``x`` [R, ...] over the ranks; backward: all-gather."""
    return _ReduceScatter.apply(x, size(), _name())


def scatter(x: Tensor) -> Tensor:
    """This rank's rows [R / n, ...] of ``x`` [R, ...], which is equal on all ranks; backward: all-gather."""
    return _Scatter.apply(x, size(), _name())


def join(x: Tensor) -> Tensor:
    """Rows [R, ...] of all ranks from ``x`` [R / n, ...], used identically on all ranks; backward: this rank's rows."""
    return _Join.apply(x, size(), _name())
