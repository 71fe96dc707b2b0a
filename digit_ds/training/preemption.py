"""Signals that ask a run to stop: SIGTERM, SIGUSR1 and Ctrl-C, on any one rank."""

import os
import signal
import time
from types import FrameType

from digit_ds.parallel import launch

STATUS = 75
"""Exit status of a run that was stopped by a signal and saved (EX_TEMPFAIL: try again later)."""
PATIENCE = 1.0
"""Seconds after which Ctrl-C is meant as pressed again: a launcher repeats the terminal's to its ranks at once."""


class StopSignal:
    """Remembers a signal until the step is over; the mailbox carries it to the other ranks.

    Ctrl-C pressed again ends the process at once. Where it was ignored before, as in a shell's background, it stays so.
    """

    def __init__(self) -> None:
        self._received, self._interrupted = False, 0.0
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def requested(self) -> bool:
        """Whether a signal came; to be asked every step.

        LLVM takes most signals for itself when Triton compiles the first kernel of this process, behind Python's back,
        and does nothing at SIGUSR1. So the handlers are set again each time.
        """
        for number in self._before:
            signal.signal(number, self._note)
        return self._received

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received = True
        if number != signal.SIGINT:
            return
        if not self._interrupted:
            self._interrupted = time.monotonic()
            if launch.is_main():  # past Python's buffers, which the signal may have come upon half written
                os.write(2, b"\nCtrl-C: saving before exit; press it again to exit at once\n")
        elif time.monotonic() - self._interrupted > PATIENCE:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
