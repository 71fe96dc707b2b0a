"""Signals that ask a run to stop: SIGTERM and SIGUSR1, on any one rank."""

import signal
from types import FrameType

STATUS = 75
"""Exit status of a run that was stopped by a signal and saved (EX_TEMPFAIL: try again later)."""


class StopSignal:
    """Remembers a signal until the step is over; the mailbox carries it to the other ranks."""

    def __init__(self) -> None:
        self.received = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
