"""Decisions that a group of processes takes once: rank 0 looks at the file system and decides, all ranks follow.

Processes that look at one file system separately can see different states of it (attribute caches of network file
systems). A refusal ends every process with exit status 2 and is printed once, by rank 0. Every function is the
identity for a process alone and must be called by all ranks in the same order.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from digit_ds.errors import UserError
from digit_ds.parallel.launch import is_main

T = TypeVar("T")

_WAIT = timedelta(days=30)
"""Rank 0 may list a folder of millions of files, and ranks wait for the slowest one's work: no short timeout fits."""
_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
"""The control group of each world: a process may leave its process group and join another one."""


def _control_group() -> dist.ProcessGroup:
    """A gloo group of all processes: Python objects between hosts, without touching a device."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()
        _groups[world] = dist.new_group(backend="gloo", timeout=_WAIT)
    return _groups[world]


def gather(value: T) -> list[T]:
    """The picklable ``value`` of every process, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control_group())
    return values


def from_main(compute: Callable[[], T]) -> T:
    """Run ``compute`` on rank 0 and return its picklable result on all processes.

    Raises:
        UserError: on rank 0, what ``compute`` raised; the other ranks leave silently with the same exit status.
        SystemExit: on the other ranks, when ``compute`` raised anything on rank 0.
    """
    value, error = None, None
    if is_main():
        try:
            value = compute()
        except BaseException as caught:  # the others must not wait for a rank that is gone
            error = caught
    if dist.is_initialized():
        status = None if error is None else 2 if isinstance(error, UserError) else 1
        shared = [value, status]
        dist.broadcast_object_list(shared, src=0, group=_control_group())
        value, status = shared
        if status is not None and not is_main():
            raise SystemExit(status)
    if error is not None:
        raise error
    return value


def fail_together(problem: str | None) -> None:
    """End all processes when any has a ``problem``: rank 0 raises the first one as a ``UserError``."""
    problems = [found for found in gather(problem) if found]
    if problems:
        if is_main():
            raise UserError(problems[0])
        raise SystemExit(2)


def wait_for_all() -> None:
    """Wait until all processes are here, however long they work."""
    if dist.is_initialized():
        dist.barrier(group=_control_group())
