"""Label-smoothed cross entropy over a vocabulary that is padded and cut over tensor-parallel ranks.

The same sum as fairseq's label-smoothed cross entropy over the true vocabulary: padded logits enter neither the softmax
nor the smoothing. Besides the logits themselves nothing of size [N, V] is kept: the backward pass writes the gradient
into the logits' memory.
"""

from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from digit_ds.parallel.frameworks import parallel_state

_ROWS = 8192
"""Rows handled at once where the arithmetic is not compiled: bounds the float32 copies of the logits."""


def vocabulary_parallel_loss(
    logits: Tensor, target: Tensor, vocabulary_size: int, smoothing: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and negative log-likelihood, both means in nats over the positions that ``mask`` weights (None: all).

    Args:
        logits: [..., V'] this rank's share of the padded vocabulary. Overwritten by the backward pass.
        target: int64 [...], ids of the whole vocabulary.
        vocabulary_size: V, without padding.
        mask: [...] weight of each position.

    Returns:
        ``loss, nll``, 0-d float32; gradients flow through ``loss`` alone.
    """
    flat = target.reshape(-1)
    if mask is None:
        weight = torch.full(flat.shape, 1.0 / flat.numel(), device=flat.device)
    else:
        weight = mask.reshape(-1).float()
        weight = weight / weight.sum().clamp(min=1)  # a batch of padding samples alone
    return _Loss.apply(logits.view(-1, logits.shape[-1]), flat, weight, vocabulary_size, smoothing)


def _statistics(logits: Tensor, target: Tensor, valid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maximum, sum of exp(logit - maximum), sum of logits, logit of the target, over the true local columns.

    ``target`` is local: outside 0..V'-1 where another rank has it, which contributes 0.
    """
    values = logits[:, :valid].float()
    top = values.amax(1) if valid else values.new_full(values.shape[:1], -torch.inf)
    total = (values - top.unsqueeze(1)).exp().sum(1)
    here = (target >= 0) & (target < logits.shape[1])
    chosen = logits.gather(1, target.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1).float()
    return top, total, values.sum(1), torch.where(here, chosen, 0.0)


def _write_gradient(
    logits: Tensor, target: Tensor, log_total: Tensor, scale: Tensor, valid: int, size: int, smoothing: float
) -> None:
    """Replace local logits by d loss / d logits: scale * (softmax - smoothing / V - (1 - smoothing) * [target])."""
    column = torch.arange(logits.shape[1], device=logits.device)
    probability = (logits.float() - log_total.unsqueeze(1)).exp()
    wanted = smoothing / size + (1.0 - smoothing) * (column == target.unsqueeze(1))
    logits.copy_(torch.where(column < valid, scale.unsqueeze(1) * (probability - wanted), 0.0))


_compiled = cache(partial(torch.compile, dynamic=False))
"""A function compiled when it is first needed: ``torch.compile`` imports the compiler, two seconds of every process."""


class _Loss(torch.autograd.Function):
    """See :func:`vocabulary_parallel_loss`."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, weight: Tensor, size: int, smoothing: float):
        """Statistics of each row, joined over the tensor-parallel group."""
        group = parallel_state.get_tensor_model_parallel_group()
        first = dist.get_rank(group) * logits.shape[1]
        valid = max(0, min(logits.shape[1], size - first))
        local = target - first
        if logits.is_cuda:
            top, total, summed, chosen = _compiled(_statistics)(logits, local, valid)
        else:
            parts = [_statistics(*rows, valid) for rows in zip(logits.split(_ROWS), local.split(_ROWS))]
            top, total, summed, chosen = (torch.cat(part) for part in zip(*parts))
        if dist.get_world_size(group) > 1:
            highest = top.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
            sums = torch.stack([total * (top - highest).exp(), summed, chosen])
            dist.all_reduce(sums, group=group)
            top, (total, summed, chosen) = highest, sums
        log_total = top + total.log()  # log of the sum of exp over the true vocabulary
        nll = ((log_total - chosen) * weight).sum()
        uniform = ((log_total - summed / size) * weight).sum()
        ctx.save_for_backward(logits, local, log_total, weight)
        ctx.sizes = valid, size, smoothing
        ctx.mark_non_differentiable(nll)
        return (1.0 - smoothing) * nll + smoothing * uniform, nll

    @staticmethod
    def backward(ctx, upstream: Tensor, _nll: Tensor):
        """The gradient, in the logits' own memory."""
        logits, local, log_total, weight = ctx.saved_tensors
        scale = weight * upstream
        if logits.is_cuda:
            _compiled(_write_gradient)(logits, local, log_total, scale, *ctx.sizes)
        else:
            for rows in zip(*(tensor.split(_ROWS) for tensor in (logits, local, log_total, scale))):
                _write_gradient(*rows, *ctx.sizes)
        return logits, None, None, None, None
