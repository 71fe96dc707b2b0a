"""Reports where a rank hangs: the stacks of its threads, before a timeout ends the job.

A rank in a collective that never completes is killed by its timeout, and the rank that it waited for by the launcher.
Where either was would be lost.
"""

import sys
import threading
import time
import traceback

from digit_ds.parallel import launch


class Watchdog:
    """A thread that writes this rank's stacks to stderr once no step has been done for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last, self._end = seconds, time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def reset(self) -> None:
        """A step is done. Costs an assignment."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """Stop watching: no further step is expected."""
        self._end.set()

    def _watch(self) -> None:
        said = 0.0  # the last step when the stacks were written: once for each stall
        while not self._end.wait(max(0.1, self._last + self._seconds - time.monotonic())):
            silence = time.monotonic() - self._last
            if silence >= self._seconds and said != self._last:
                said = self._last
                # In one piece, below the progress bar: all ranks write at about the same time, often into one file.
                print(f"\n{self._stacks(silence)}", file=sys.stderr, flush=True)

    def _stacks(self, silence: float) -> str:
        who = f"rank {launch.rank()} ({launch.host()})"
        parts = [f"warning: {who} has finished no step for {silence:.0f} s; its threads, latest calls last:\n"]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for number, frame in sys._current_frames().items():
            if number != threading.get_ident():
                parts += [f"{who}, thread {names.get(number, number)}:\n", *traceback.format_stack(frame)]
        return "".join(parts) + f"end of the threads of {who}"
