"""Commands that write a completion file each, so that an interrupted run continues and no step is run twice.

The file names its command without the folders of this machine: a folder of results may be moved and
continued elsewhere.
"""

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import digit_ds
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json
from digit_ds.workdir import WorkDirectory, is_begun

REPOSITORY = Path(digit_ds.__file__).parents[1]
_PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Step:
    """One command, the steps it waits for, and the file that marks it as done."""

    name: str
    out: Path
    """The folder of all results; what a command writes lies below it."""
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Names of the steps whose results it reads."""

    @property
    def note(self) -> Path:
        """JSON with ``seconds`` (of the attempt that finished) and ``peak_gib`` (of the largest process so far)."""
        return self.out / "steps" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """What the command writes where steps run side by side."""
        return self.out / "logs" / f"{self.name}.log"

    @property
    def portable_command(self) -> list[str]:
        """The command with OUT, REPOSITORY and ``python`` in place of this machine's paths."""
        places = ((str(self.out), "OUT"), (str(REPOSITORY), "REPOSITORY"))
        words = ["python", *self.command[1:]] if self.command[0] == sys.executable else list(self.command)
        for path, name in places:
            words = [word.replace(path, name) for word in words]
        return words

    def is_done(self) -> bool:
        """Whether an earlier run finished this step with this very command."""
        if not self.note.exists():
            return False
        if read_json(self.note).get("command") != self.portable_command:
            raise UserError(f"{self.note}: is of another version of the demo; delete {self.out} to start again")
        return True

    def start(self, to_log: bool) -> subprocess.Popen:
        """Start the command; its output goes to the terminal or is appended to the log."""
        # The networks are small: a second thread gains little, and on a busy machine waiting OpenMP threads keep the
        # cores from those that have work.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if not to_log:
            return subprocess.Popen(self.command, env=environment)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as stream:
            return subprocess.Popen(self.command, env=environment, stdout=stream, stderr=subprocess.STDOUT)

    def finish(self, seconds: float) -> None:
        """Write the completion file."""
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        note = {"command": self.portable_command, "seconds": round(seconds, 1), "peak_gib": round(peak, 2)}
        write_json(self.note, note)


def claim(out: Path, marker: str, settings: dict) -> WorkDirectory[bool]:
    """Lock the folder of a demo and leave the settings in the file ``marker``; one with other results is refused."""
    path = out / marker

    def look() -> bool:
        return is_begun(
            out,
            read_json(path) if path.exists() else None,
            settings,
            another="holds a demo run with other settings",
            foreign=f"exists and holds no demo run (no {marker})",
        )

    directory = WorkDirectory(out, look)
    if not directory.found:
        write_json(path, settings)
    return directory


def run_steps(steps: Sequence[Step], jobs: int = 1) -> bool:
    """Run what is not done yet, up to ``jobs`` steps side by side, each once those it needs are done.

    One after the other they write to the terminal, side by side to their logs. When one fails, or on Ctrl-C and SIGTERM
    (exit status 130), the others get SIGINT, on which training saves a checkpoint.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: a step failed.
    """
    done = {step.name for step in steps if step.is_done()}
    waiting = [step for step in steps if step.name not in done]
    count, started = len(waiting), 0
    running: dict[Step, tuple[subprocess.Popen, float]] = {}
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            ready = [step for step in waiting if done.issuperset(step.needs)]
            for step in ready[: jobs - len(running)]:
                waiting.remove(step)
                started += 1
                shown = f"\n$ {shlex.join(step.command)}" if jobs == 1 else f" -> {step.log}"
                print(f"{'' if jobs > 1 else chr(10)}[{started}/{count}] {step.name}{shown}", flush=True)
                running[step] = step.start(to_log=jobs > 1), time.perf_counter()
            for step, (process, start) in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[step]
                if status:
                    place = f" ({step.log})" if jobs > 1 else ""
                    raise UserError(
                        f"{step.name}: ended with status {status}{place}; the same demo command continues from here"
                    )
                step.finish(time.perf_counter() - start)
                done.add(step.name)
                if jobs > 1:
                    print(f"[{len(done)} of {len(steps)} done] {step.name}", flush=True)
            time.sleep(_PAUSE_SECONDS)
    except KeyboardInterrupt:
        names = ", ".join(step.name for step in running)
        _stop([process for process, _ in running.values()])
        print(f"\ninterrupted in step {names}; the same demo command continues there", file=sys.stderr, flush=True)
        sys.exit(130)
    except UserError:
        _stop([process for process, _ in running.values()])
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
    return count > 0


def _stop(processes: list[subprocess.Popen]) -> None:
    """Send SIGINT to running commands; training saves a checkpoint."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()
