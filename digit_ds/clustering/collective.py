"""The few collective operations clustering needs; each is the identity for a process alone."""

import torch
import torch.distributed as dist

from digit_ds.parallel.launch import device


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of ``tensor`` over all processes."""
    return _reduce(tensor, dist.ReduceOp.SUM)


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum of ``tensor`` over all processes."""
    return _reduce(tensor, dist.ReduceOp.MAX)


def _reduce(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if not dist.is_initialized():
        return tensor
    # NCCL takes CUDA tensors alone; on gloo everything is on the CPU already.
    moved = tensor.to(device()) if dist.get_backend() == "nccl" else tensor
    dist.all_reduce(moved, operation)
    return moved.to(tensor.device)
