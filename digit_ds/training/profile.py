"""``monitor.profile_step``: a trace of some steps by torch.profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from digit_ds.parallel import launch

STEPS = 3
"""Steps of a trace. What is sent at the end of a step overlaps with the next one, so one step shows too little."""


class Profile:
    """Traces of rank 0 in ``RUN/profile/step_N.json``; steps are marked there as ``training step N``."""

    def __init__(self, folder: Path, first: int) -> None:
        """``first``: the first step that is traced; 0: none."""
        self._folder, self._steps = folder, range(first, first + STEPS) if first and launch.is_main() else range(0)
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the work of a step."""
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        with torch.profiler.record_function(f"training step {number}"):
            yield
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what was traced; also when the run ends before the last step of the trace."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / f"step_{self._steps[0]:08d}.json"))
