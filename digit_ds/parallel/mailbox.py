"""Sums of a few whole numbers over all processes, between hosts (gloo): at once, or while the device works.

gloo's own all-reduce passes around a ring, 2 (N - 1) messages one after the other. Here the sum is made by recursive
doubling: log2(N) exchanges between pairs, and two messages more where N is no power of two (Thakur, Rabenseifner and
Gropp 2005, "Optimization of Collective Communication Operations in MPICH", section 4.1).
"""

import threading

import torch
import torch.distributed as dist

_TAG = 1
"""Of the messages; collectives of the same group have tags of their own."""


class Mailbox:
    """One message at a time: every process sends the same number of values, and all receive their sums."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """``group``: a gloo group of all processes; None: this process is alone."""
        self._group = group
        self._message: _Message | None = None

    def send(self, values: list[int]) -> None:
        """Begin a sum of int64 ``values``, which wrap around; the one before must have been received."""
        assert self._message is None, "receive the message that is under way first"
        self._message = _Message(self._group, values)

    def receive(self) -> list[int] | None:
        """Wait for the sums of the last message, the same on every process; None: none is under way.

        Raises:
            RuntimeError: another process has ended, or was silent for the group's timeout.
        """
        if self._message is None:
            return None
        message, self._message = self._message, None
        return message.wait()


class _Message:
    """A sum on its way. A thread of its own carries it, so that the caller can go on."""

    def __init__(self, group: dist.ProcessGroup | None, values: list[int]) -> None:
        self._sums = values
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if group is not None and group.size() > 1:
            self._thread = threading.Thread(target=self._carry, args=(group,), name="mailbox", daemon=True)
            self._thread.start()

    def _carry(self, group: dist.ProcessGroup) -> None:
        try:
            self._sums = total(group, self._sums)
        except BaseException as error:  # handed to the thread that waits
            self._error = error

    def wait(self) -> list[int]:
        """The sums, once they are there."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._sums


def total(group: dist.ProcessGroup, values: list[int]) -> list[int]:
    """Sums of int64 ``values`` over the processes of a gloo group.

    Raises:
        RuntimeError: another process has ended, or was silent for the group's timeout.
    """
    rank, size = group.rank(), group.size()
    sums = torch.tensor(values, dtype=torch.int64)
    other = torch.empty_like(sums)
    core = 1 << (size.bit_length() - 1)  # the largest power of two
    if rank >= core:
        group.send([sums], rank - core, _TAG).wait()
        group.recv([sums], rank - core, _TAG).wait()
        return sums.tolist()
    if rank + core < size:
        group.recv([other], rank + core, _TAG).wait()
        sums += other
    distance = 1
    while distance < core:
        received = group.recv([other], rank ^ distance, _TAG)
        group.send([sums], rank ^ distance, _TAG).wait()
        received.wait()
        sums += other
        distance *= 2
    if rank + core < size:
        group.send([sums], rank + core, _TAG).wait()
    return sums.tolist()
