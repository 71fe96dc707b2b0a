"""Decisions that a group of processes takes once: rank 0 reads the file system and decides, all ranks follow.

Processes that look at one file system separately can see different states of it (attribute caches of network file
systems). A refusal ends every process with exit status 2 and is printed once, by rank 0. Every function is the
identity for a process alone and must be called by all ranks in the same order.
"""

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from digit_ds.errors import UserError, file_error, report_lost_peer
from digit_ds.parallel.launch import is_main

T = TypeVar("T")

_WAIT = timedelta(days=30)
"""Rank 0 may list a folder of millions of files, and ranks wait for the slowest one's work: no short timeout fits."""
_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
"""The control group of each world: a process may leave its process group and join another one."""


def _control_group() -> dist.ProcessGroup:
    """A gloo group of all processes: Python objects between hosts, without touching a device."""
    world = dist.group.WORLD
    assert world is not None  # callers look first
    if world not in _groups:
        _groups.clear()
        created = dist.new_group(backend="gloo", timeout=_WAIT)
        assert isinstance(created, dist.ProcessGroup)
        _groups[world] = created
        atexit.register(_leave, created)  # runs before ``launch`` leaves the process group
    return _groups[world]


def forget() -> None:
    """Drop the control group before the process group is destroyed: in a forked process that would hang later."""
    _groups.clear()


def _leave(group: dist.ProcessGroup) -> None:
    """Stop the threads of a control group that is still there: see ``launch``, and NCCL's end does not stop them."""
    if group in _groups.values() and dist.is_initialized():
        forget()
        dist.destroy_process_group(group)


@contextmanager
def _peers() -> Iterator[dist.ProcessGroup]:
    """The control group; when one of its processes has exited, the others exit with a message that points there."""
    try:
        yield _control_group()
    except RuntimeError as error:
        report_lost_peer()
        raise SystemExit(2) from error


def gather(value: T) -> list[T]:
    """The picklable ``value`` of every process, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with _peers() as group:
        dist.all_gather_object(values, value, group=group)
    return values


def from_main(compute: Callable[[], T]) -> T:
    """Run ``compute`` on rank 0 and return its picklable result on all processes.

    Raises:
        UserError: on rank 0, what ``compute`` raised, or a file that it could not use; the other ranks leave silently
            with the same exit status.
        SystemExit: on the other ranks, when ``compute`` raised anything on rank 0.
    """
    value, error = None, None
    if is_main() or not dist.is_initialized():
        try:
            value = compute()
        except BaseException as caught:  # the others must not wait for a rank that is gone
            error = _one_line(caught)
    if dist.is_initialized():
        status = None if error is None else 2 if isinstance(error, UserError) else 1
        shared: list[Any] = [value, status]
        with _peers() as group:
            dist.broadcast_object_list(shared, src=0, group=group)
        value, status = shared
        if status is not None and not is_main():
            raise SystemExit(status)
    if error is not None:
        raise error
    return cast(T, value)


def fail_together(problem: str | None) -> None:
    """End all processes when any has a ``problem``: rank 0 raises the first one as a ``UserError``."""
    problems = [found for found in gather(problem) if found]
    if problems:
        if is_main():
            raise UserError(problems[0])
        raise SystemExit(2)


@contextmanager
def together() -> Iterator[None]:
    """Around what every process does for itself, such as reading files: when one cannot, none goes on.

    Nothing inside may wait for other processes.

    Raises:
        UserError: on rank 0, what the first process raised that could not, or a file that it could not use.
        SystemExit: on the other ranks.
    """
    problem = None
    try:
        yield
    except (UserError, OSError) as error:
        known = _one_line(error)
        if not isinstance(known, UserError):
            raise
        if not dist.is_initialized():
            raise known from error
        problem = str(known)
    fail_together(problem)


def agree(value: T, what: str) -> T:
    """Return ``value`` when every process has the same one; otherwise all end.

    Args:
        value: picklable and comparable; mappings are compared key by key.
        what: names it in the refusal.

    Raises:
        UserError: on rank 0, naming the process and the first key that differs.
    """
    values = gather(value)
    for number, other in enumerate(values):
        if other != values[0]:
            detail = ""
            if isinstance(other, dict) and isinstance(values[0], dict):
                keys = other.keys() | values[0].keys()
                key = min(key for key in keys if other.get(key) != values[0].get(key))
                detail = f" ({key}: {other.get(key)} and {values[0].get(key)})"
            fail_together(
                f"{what}: rank {number} reads something other than rank 0{detail}, "
                "expected files that all processes share"
            )
    return value


def _one_line(error: BaseException) -> BaseException:
    """A failure of the file system as the user's error, anything else as it is."""
    return (isinstance(error, OSError) and file_error(error)) or error


def wait_for_all() -> None:
    """Wait until all processes are here, however long they work."""
    if dist.is_initialized():
        with _peers() as group:
            dist.barrier(group=group)
