"""Sums of a few whole numbers over all processes, between hosts (gloo): at once, or while the device works.

gloo's own all-reduce passes around a ring, 2 (N - 1) messages one after the other. Here the sum is made by recursive
doubling: log2(N) exchanges between pairs, and two messages more where N is no power of two (Thakur, Rabenseifner and
Gropp 2005, "Optimization of Collective Communication Operations in MPICH", section 4.1).
"""

from functools import partial

import torch
import torch.distributed as dist

from digit_ds.parallel.background import Background

MAIL, LINES = 1, 2
"""Tags of the messages of sums that may be under way at the same time; collectives of the same group have their own."""


class Mailbox:
    """One message at a time: every process sends the same number of values, and all receive their sums."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """``group``: a gloo group of all processes; None: this process is alone."""
        self._group = group
        self._message: Background[list[int]] | list[int] | None = None

    def send(self, values: list[int]) -> None:
        """Begin a sum of int64 ``values``, which wrap around; the one before must have been received."""
        assert self._message is None, "receive the message that is under way first"
        if self._group is None or self._group.size() == 1:
            self._message = values
        else:
            self._message = Background(partial(total, self._group, values), "mailbox")

    def receive(self) -> list[int] | None:
        """Wait for the sums of the last message, the same on every process; None: none is under way.

        Raises:
            RuntimeError: another process has ended, or was silent for the group's timeout.
        """
        message, self._message = self._message, None
        return message.wait() if isinstance(message, Background) else message


def total(group: dist.ProcessGroup, values: list[int], tag: int = MAIL) -> list[int]:
    """Sums of int64 ``values`` over the processes of a gloo group. Sums at the same time need different tags.

    Raises:
        RuntimeError: another process has ended, or was silent for the group's timeout.
    """
    rank, size = group.rank(), group.size()
    sums = torch.tensor(values, dtype=torch.int64)
    other = torch.empty_like(sums)
    core = 1 << (size.bit_length() - 1)  # the largest power of two
    if rank >= core:
        group.send([sums], rank - core, tag).wait()
        group.recv([sums], rank - core, tag).wait()
        return sums.tolist()
    if rank + core < size:
        group.recv([other], rank + core, tag).wait()
        sums += other
    distance = 1
    while distance < core:
        received = group.recv([other], rank ^ distance, tag)
        group.send([sums], rank ^ distance, tag).wait()
        received.wait()
        sums += other
        distance *= 2
    if rank + core < size:
        group.send([sums], rank + core, tag).wait()
    return sums.tolist()
