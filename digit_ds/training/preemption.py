"""Signals that ask a run to stop: SIGTERM and SIGUSR1, on any one rank."""

import signal
from multiprocessing import resource_tracker
from types import FrameType

STATUS = 75
"""Exit status of a run that was stopped by a signal and saved (EX_TEMPFAIL: try again later)."""


def shield_helper() -> None:
    """Start multiprocessing's resource tracker such that SIGUSR1 does not end it; before any shared memory is made.

    srun signals every process of a rank. A tracker that died is started again, knows nothing of what there was, and
    fills the log of a job that stops in good order with tracebacks.
    """
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # what is ignored stays so in a new program
    resource_tracker.ensure_running()
    signal.signal(signal.SIGUSR1, before)


class StopSignal:
    """Remembers a signal until the step is over; the mailbox carries it to the other ranks."""

    def __init__(self) -> None:
        self._received = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def heard(self) -> bool:
        """Whether a signal came; to be asked every step.

        LLVM takes most signals for itself when Triton compiles the first kernel of this process, behind Python's back,
        and does nothing at SIGUSR1. So the handlers are set again each time.
        """
        for number in self._before:
            signal.signal(number, self._note)
        return self._received

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
