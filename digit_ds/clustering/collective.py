"""The few collective operations clustering needs; each is the identity for a process alone."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from digit_ds.errors import UserError
from digit_ds.parallel.launch import device, is_main

T = TypeVar("T")


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of ``tensor`` over all processes."""
    return _reduce(tensor, dist.ReduceOp.SUM)


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum of ``tensor`` over all processes."""
    return _reduce(tensor, dist.ReduceOp.MAX)


def _reduce(tensor: torch.Tensor, operation: dist.ReduceOp) -> torch.Tensor:
    if not dist.is_initialized():
        return tensor
    # NCCL takes CUDA tensors alone; on gloo everything is on the CPU already.
    moved = tensor.to(device()) if dist.get_backend() == "nccl" else tensor
    dist.all_reduce(moved, operation)
    return moved.to(tensor.device)


def gather(value: T) -> list[T]:
    """``value`` of every process, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(compute: Callable[[], T]) -> T:
    """Run ``compute`` on rank 0 and give its (picklable) result to all processes.

    A ``UserError`` ends every process: rank 0 raises it, the others leave with the same exit status, silently, so
    that the user reads one sentence and nobody waits for a process that is gone.
    """
    value, error = None, None
    if is_main():
        try:
            value = compute()
        except UserError as caught:
            error = caught
    if dist.is_initialized():
        shared = [value, error is not None]
        dist.broadcast_object_list(shared, src=0)
        value, failed = shared
        if failed and not is_main():
            raise SystemExit(2)
    if error:
        raise error
    return value


def fail_together(problem: str | None) -> None:
    """Raise the first process's ``problem``, if any process has one, as a ``UserError`` (see ``from_main``)."""
    problems = [found for found in gather(problem) if found]
    if problems:
        if is_main():
            raise UserError(problems[0])
        raise SystemExit(2)
