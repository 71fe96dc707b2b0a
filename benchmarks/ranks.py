"""A ``digit-ds`` command on several processes of this machine, as a launcher would start them.

torchrun would end ranks that are still saving when the first one leaves, and hides their exit statuses.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from ports import free_port  # noqa: E402

PATIENCE = 20.0
"""Seconds in which the other ranks may exit after one has failed."""


class Ranks:
    """Processes of one job, which write into ``LOG/rank0.log`` and so on; ended when the block is left."""

    def __init__(self, arguments: list, world: int, log: Path, environment: Mapping[str, str] | None = None) -> None:
        port = free_port()
        log.mkdir(parents=True, exist_ok=True)
        self.command, self.logs = list(map(str, arguments)), [log / f"rank{rank}.log" for rank in range(world)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        shared = os.environ | {
            "PYTHONPATH": path, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        } | dict(environment or {})  # fmt: skip
        self.processes = []
        for rank, path in enumerate(self.logs):
            with path.open("ab") as stream:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "digit_ds", *self.command],
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=stream,
                        stderr=stream,
                        start_new_session=True,  # loader processes end with their rank
                    )
                )
        self._failed: float | None = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def statuses(self) -> list[int | None]:
        """Exit statuses so far; after a failed rank the others are ended too, as they would wait for it."""
        found = [process.poll() for process in self.processes]
        if None in found and any(found):
            self._failed = self._failed or time.monotonic()
            if time.monotonic() - self._failed > PATIENCE and not set(found) <= {None, 75}:
                self.kill()
        return found

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses after at most ``seconds``; None: still running."""
        end = time.monotonic() + seconds
        while None in (found := self.statuses()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def finish(self) -> None:
        """Wait for a good end.

        Raises:
            SystemExit: a rank failed.
        """
        if any(found := self.wait(float("inf"))):
            raise SystemExit(f"digit-ds {' '.join(self.command)} ended with {found}:\n{self.tail()}")

    def kill(self) -> None:
        """End what still runs, each with the processes that it started."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def tail(self, characters: int = 4000) -> str:
        """The end of what a failed rank wrote, else of rank 0's output."""
        failed = [path for path, process in zip(self.logs, self.processes) if process.poll()]
        return (failed or self.logs)[0].read_text(errors="replace")[-characters:]
