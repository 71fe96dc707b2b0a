"""Lines of metrics for which no rank waits.

A line has numbers of all ranks: the mean loss, the tokens that occurred, the own time of each rank, the hash of the
samples. Their sums begin when a step is done, and a thread completes and writes the line while the next steps run.
Where it is needed (before a checkpoint, so that none is ahead of the metrics) the step loop waits for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from digit_ds.data.stream import chained_hash
from digit_ds.parallel.background import Background
from digit_ds.parallel.mailbox import LINES
from digit_ds.parallel.topology import Topology
from digit_ds.training.metrics import Reporter
from digit_ds.training.pace import Marks, Pace


class Samples(NamedTuple):
    """The samples of a step: what their part of ``sample_ids_hash`` is made from."""

    before: int
    """The hash of all earlier steps."""
    own: int
    """This rank's part of the sum that continues it."""


class MetricLines:
    """One line at a time. Every rank calls every method, at the same steps."""

    def __init__(self, place: Topology, group: dist.ProcessGroup, pace: Pace, report: Reporter) -> None:
        """``group``: the data-parallel ranks, on whose devices losses and tokens are reduced."""
        self._place, self._group, self._pace, self._report = place, group, pace, report
        self._line: Background[None] | None = None
        # In the stream of training the device would wait, behind these sums, for weights that are still on their way.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def begin(
        self, values: dict[str, Any], loss: Tensor, nll: Tensor, norm: Tensor | float, used: Tensor, samples: Samples
    ) -> None:
        """Begin the line of a step, once the one before is written.

        Args:
            values: all metrics of the line in their order; those that this class finds out are replaced.
            loss: scalar, of this rank; not changed.
            nll: the same.
            norm: of the gradient, the same on all ranks.
            used: uint8 [V], 1 for each id that this rank's targets had since the last line; given away.
            samples: of the step.
        """
        self.wait()
        if self._stream is not None and loss.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for tensor in (loss, nll, used, norm):
                    if isinstance(tensor, Tensor) and tensor.is_cuda:
                        tensor.record_stream(self._stream)
                arrived = _on_the_way(self._summed(loss, nll, used, norm)())
        else:
            arrived = self._summed(loss, nll, used, float(norm))
        self._line = Background(partial(self._complete, values, arrived, self._pace.take(), samples), "metrics")

    def wait(self) -> None:
        """Until the line that was begun is written.

        Raises:
            RuntimeError: another process has ended, or was silent for the group's timeout.
        """
        line, self._line = self._line, None
        if line is not None:
            line.wait()

    def _summed(self, loss: Tensor, nll: Tensor, used: Tensor, norm: Tensor | float) -> Callable[[], Tensor]:
        """Begin the sums over ranks; a call waits for them, on a GPU in the device's queue."""
        means = torch.stack([loss, nll]).float()
        works = [
            dist.all_reduce(means, group=self._group, async_op=True),
            dist.all_reduce(used, dist.ReduceOp.MAX, group=self._group, async_op=True),
        ]

        def arrived() -> Tensor:
            for reduced in works:
                reduced.wait()
            return self._numbers(means, used, norm)

        return arrived

    def _numbers(self, means: Tensor, used: Tensor, norm: Tensor | float) -> Tensor:
        """float64 [4], on the device of ``means``: loss and nll over all ranks, share of the ids, norm."""
        if isinstance(norm, Tensor) and norm.is_cuda:
            last = norm.double().reshape(1)
        else:
            last = means.new_full((1,), float(norm), dtype=torch.float64)
        share = used.sum().double() / used.numel()
        return torch.cat([(means / self._place.data_size).double(), share.reshape(1), last])

    def _complete(self, values: dict[str, Any], arrived: Callable[[], Tensor], marks: Marks, samples: Samples) -> None:
        loss, nll, used, norm = arrived().tolist()
        *nanoseconds, own = self._place.sum([*self._pace.own_nanoseconds(marks), samples.own], LINES)
        ranks, slow = self._pace.compare(nanoseconds)
        if slow:
            self._report.say(f"warning: {slow}")
        found = {"loss": loss, "nll": nll, "grad_norm": norm, "token_usage": used, **ranks}
        self._report.log(values | found | {"sample_ids_hash": f"{chained_hash(samples.before, own):016x}"})


def _on_the_way(numbers: Tensor) -> Callable[[], Tensor]:
    """Begin to copy numbers from the device; a call waits for them, and for all that the device had to do before."""
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def arrived() -> Tensor:
        event.synchronize()
        return host

    return arrived
