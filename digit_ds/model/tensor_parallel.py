"""Collectives over the tensor-parallel group that autograd and torch.compile can trace.

Megatron-core's own ones break the compiler's graph. Each function here is a pair of conjugate operations, as in
Megatron-LM (arXiv 1909.08053; with rows cut over the ranks, arXiv 2205.05198): what is copied forward is summed
backward, what is gathered forward is reduce-scattered backward. Rows are the first dimension, in the ranks' order.
"""

import torch
from torch import Tensor

from digit_ds.parallel.frameworks import parallel_state

_OPS = torch.ops._c10d_functional


def size() -> int:
    """Ranks of the group."""
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
    """The sum of the input's gradient over the ranks travels while the weight's gradient is computed."""

    @staticmethod
    def forward(ctx, x, weight, bias, ranks, group, sequence):
        ctx.ranks, ctx.group, ctx.sequence = ranks, group, sequence
        if sequence:
            x = _gather(x, ranks, group)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return torch.nn.functional.linear(x, weight, bias)

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
        return _OPS.wait_tensor(sent), of_weight, of_bias, None, None, None


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


def own_rows(x: Tensor) -> Tensor:
    """This rank's rows of a tensor that every rank holds whole."""
    count = x.shape[0] // size()
    return x.narrow(0, parallel_state.get_tensor_model_parallel_rank() * count, count)


def first_row(x: Tensor) -> int:
    """Which of all ranks' rows the first of this rank's rows ``x`` is."""
    return parallel_state.get_tensor_model_parallel_rank() * x.shape[0]


def copy(x: Tensor) -> Tensor:
    """A tensor that each rank then uses in its own way: the gradient is the sum over the ranks."""
    return _Copy.apply(x, _name())


def copy_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    """:func:`copy` of several small tensors with one reduction."""
    return _CopyAll.apply(_name(), *tensors)


def reduce(x: Tensor) -> Tensor:
    """Sum over the ranks, used identically on all of them."""
    return _Reduce.apply(x, _name())


def column_product(x: Tensor, weight: Tensor, bias: Tensor | None, sequence: bool) -> Tensor:
    """``linear(x, weight, bias)`` with this rank's share of the output features.

    ``x`` is whole on every rank or, with ``sequence``, this rank's rows of it.
    """
    return _ColumnProduct.apply(x, weight, bias, size(), _name(), sequence)


def reduce_scatter(x: Tensor) -> Tensor:
    """This rank's rows of the sum over the ranks."""
    return _ReduceScatter.apply(x, size(), _name())


def scatter(x: Tensor) -> Tensor:
    """This rank's rows of a tensor that all ranks computed alike."""
    return _Scatter.apply(x, size(), _name())


def join(x: Tensor) -> Tensor:
    """Rows of all ranks, used identically on all of them."""
    return _Join.apply(x, size(), _name())
