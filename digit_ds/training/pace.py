"""Straggler detection: how long each one needs for the part of a step that it does by itself.

The wall time of a step is useless for that: the ranks leave its sums together, so it is the slowest rank's time on all
of them. What a rank does by itself is waiting for its data and the forward pass; in the backward pass, the update and
the exchange a fast rank waits for the slow ones. On GPUs the time is the device's, between two events in its queue,
so neither the host nor the device waits for the measurement: a throttled device shows, and a loader or a host as soon
as the device runs dry. Under tensor parallelism the layers hold sums too, and a group has one time; under ZeRO 3
they gather weights, and only waiting for data tells the ranks apart.
"""

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from digit_ds.parallel import launch
from digit_ds.parallel.topology import Topology

SLOW = 1.3
"""A rank is slow when it needs this many times the usual,"""
LEAST_SECONDS = 0.02
"""and at least this many more seconds a step: smaller differences come from the scheduler and cost little."""
WINDOWS = 2
"""It is named after so many logged windows in a row: a single one may be a compilation or a slow file system."""

Marks = list[tuple[Any, Any]]
"""Begin and end of each micro-batch's own work: seconds, or CUDA events."""


class Pace:
    """Times the own work of this rank and compares it with the other ranks' once per logged window."""

    def __init__(self, place: Topology, device: torch.device, micro_batches: int) -> None:
        self._place, self._on_gpu, self._micro_batches = place, device.type == "cuda", micro_batches
        self._hosts = [launch.host()] * place.world_size
        if place.world_size > 1:
            dist.all_gather_object(self._hosts, launch.host(), group=place.mailbox)
        self._marks: Marks = []
        self._begun: float | torch.cuda.Event = 0.0
        self._slow: int | None = None  # the rank that was slow in the window before
        self._windows = 0  # in how many of them in a row

    def begin(self) -> None:
        """This rank starts a micro-batch."""
        self._begun = self._now()

    def end(self) -> None:
        """The next operation is a collective with other ranks."""
        self._marks.append((self._begun, self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> Marks:
        """The times of the steps since the last call, for :meth:`own_nanoseconds`."""
        marks, self._marks = self._marks, []
        return marks

    def own_nanoseconds(self, marks: Marks) -> list[int]:
        """This rank's own time a step in its place among all ranks, zeros elsewhere: what is to be summed over ranks.

        The device must have done the steps. For any thread.
        """
        own = sum(b.elapsed_time(e) / 1e3 if self._on_gpu else e - b for b, e in marks)
        nanoseconds = [0] * self._place.world_size
        nanoseconds[launch.rank()] = round(own * self._micro_batches / len(marks) * 1e9)
        return nanoseconds

    def compare(self, nanoseconds: list[int]) -> tuple[dict[str, float | int], str | None]:
        """Own seconds a step over all ranks; a message when one rank starts to delay the others.

        The median is the lower one of two, so that of two ranks the faster is the usual one.
        """
        seconds = [value / 1e9 for value in nanoseconds]
        median, slowest = statistics.median_low(seconds), max(range(len(seconds)), key=seconds.__getitem__)
        values = {"rank_seconds_max": seconds[slowest], "rank_seconds_median": median, "slowest_rank": slowest}
        slow = slowest if seconds[slowest] > max(SLOW * median, median + LEAST_SECONDS) else None
        self._windows = 0 if slow is None else 1 + self._windows * (slow == self._slow)
        self._slow = slow
        if self._windows != WINDOWS:
            return values, None
        return values, (
            f"rank {slowest} ({self._hosts[slowest]}) delays the other ranks: its own work takes "
            f"{seconds[slowest]:.3g} s a step where {median:.3g} s is usual"
        )
