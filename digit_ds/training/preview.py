"""Pictures and figures of new checkpoints while a run goes on, by a process of rank 0's own.

The process reads the checkpoint from disk, exports it and draws; the step loop looks for results and never waits for
them. It is a process and no thread: drawing builds models, which takes from the random numbers of its process, and
training's must be the same with and without previews. It is started afresh, since a fork cannot use CUDA.

On a GPU it takes no more than training leaves free. Where that does not suffice rank 0 draws by itself between two
steps, in the memory that a step needs for its activations, and the other ranks wait.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from digit_ds.parallel import launch
from digit_ds.parallel.workers import ignore_stop_signals
from digit_ds.training.export import export
from digit_ds.training.metrics import Reporter, warn
from digit_ds.training.settings import ExportSettings
from digit_ds.training.stored import checkpoint_step

SampleGrid = Callable[[Path], Tensor]
"""Draws samples of a released model directory as one picture [3, H, W]."""
Figures = Callable[[Path], dict[str, float]]
"""What to log of a released model directory."""

WAITING = 3
"""Checkpoints that may wait for their preview, the one being drawn among them; each is kept on disk meanwhile."""
NICENESS = 10
"""Of the process that draws: training goes first where they share cores."""
MARGIN = 1 / 16
"""Share of the GPU's memory that the process leaves free, for what training may still allocate."""


class _Drawing(NamedTuple):
    """What to make of a checkpoint. Pickled to the process."""

    model: Path
    """Directory for the exported model, which is removed again."""
    average: bool
    """Whether to draw with the moving average of the weights."""
    sample_grid: SampleGrid | None
    figures: Figures | None

    def of(self, checkpoint: Path) -> "_Drawn":
        """Draw; an error is part of the answer, except lack of memory on the GPU."""
        grid, figures, problem = None, None, None
        shutil.rmtree(self.model, ignore_errors=True)
        try:
            export(ExportSettings(run=str(checkpoint), out=str(self.model), ema=self.average))
            if self.sample_grid is not None:
                grid = self.sample_grid(self.model).cpu().numpy()
            if self.figures is not None:
                figures = self.figures(self.model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem = _reason(error)
        finally:
            shutil.rmtree(self.model, ignore_errors=True)
        return _Drawn(grid, figures, problem)


class _Drawn(NamedTuple):
    """What was made of one checkpoint."""

    grid: np.ndarray | None = None
    figures: dict[str, float] | None = None
    problem: str | None = None


class _NoRoom(NamedTuple):
    """The process cannot draw on a GPU that training fills, or that it may not use."""

    reason: str


class Preview:
    """Exports each new checkpoint and logs what the given functions make of it. Works on rank 0.

    A failure is a warning: a run that trains well does not end for a picture.
    """

    def __init__(
        self, run: Path, average: bool, sample_grid: SampleGrid | None, figures: Figures | None, patience: float
    ) -> None:
        """``patience``: seconds after which the drawing of one checkpoint is given up."""
        self._drawing = _Drawing(run / ".preview", average, sample_grid, figures)
        self._patience = patience
        self._waiting: list[Path] = []  # the first one is being drawn
        self._beside = True  # in a process
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._since: float | None = None  # when the process was given a checkpoint
        self.begun = False
        """Whether a checkpoint was ever to be drawn."""

    def in_use(self) -> set[str]:
        """Names of the checkpoints that must stay until their preview is there. For any thread."""
        return {path.name for path in self._waiting.copy()}

    def begin(self, checkpoints: list[Path]) -> None:
        """Have ``checkpoints`` drawn, in turn; where they come faster, the oldest that waits is passed over."""
        if self._drawing.sample_grid is None and self._drawing.figures is None:
            return
        for path in checkpoints:
            self.begun = True
            self._waiting.append(path)
            if len(self._waiting) > WAITING:
                _warn_of(self._waiting.pop(1), "checkpoints come faster than they can be drawn")
        self._send()

    def collect(self, report: Reporter, seconds: float = 0.0) -> bool:
        """Log what has been drawn, waiting up to ``seconds`` for it. Whether more is to come."""
        while self._waiting:
            self._send()
            result = self._receive(seconds) if self._beside else self._draw()
            if result is None:
                break
            if isinstance(result, _NoRoom):
                self._draw_between_steps(result.reason)
                continue
            path = self._waiting.pop(0)
            step = checkpoint_step(path)
            if result.grid is not None:
                report.image("samples", torch.from_numpy(result.grid), step)
            if result.figures is not None:
                report.log({"step": step, **result.figures})
            if result.problem is not None:
                _warn_of(path, result.problem)
        return bool(self._waiting)

    def close(self, reason: str) -> None:
        """End the process; what it has not drawn is not drawn, because of ``reason``."""
        self._stop()
        for path in self._waiting:
            _warn_of(path, reason)
        self._waiting = []

    def _send(self) -> None:
        """Give the process the first checkpoint that waits, unless it has it."""
        if self._since is not None or not self._waiting or not self._beside:
            return
        if self._process is not None and not self._process.is_alive():
            self._stop()
        try:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            self._connection.send(self._waiting[0])
        except Exception as error:  # functions that cannot be pickled, no memory for a process
            self._draw_between_steps(_reason(error))
            return
        self._since = time.monotonic()

    def _receive(self, seconds: float) -> _Drawn | _NoRoom | None:
        """What became of the first checkpoint; None: nothing yet."""
        assert self._connection is not None and self._since is not None
        try:
            if self._connection.poll(seconds):
                result = self._connection.recv()
                self._since = None
                return result
        except (EOFError, OSError):
            self._stop()
            return _Drawn(problem="the process that draws has ended, perhaps for want of memory")
        if time.monotonic() - self._since > self._patience:
            self._stop()
            return _Drawn(problem=f"not drawn after training.timeout_seconds, {self._patience:g} s")
        return None

    def _draw(self) -> _Drawn:
        """In this process, while everything else waits."""
        try:
            return self._drawing.of(self._waiting[0])
        except torch.OutOfMemoryError as error:
            return _Drawn(problem=_reason(error))

    def _draw_between_steps(self, reason: str) -> None:
        """From now on."""
        self._stop()
        self._beside = False
        warn(f"previews cannot be drawn beside training ({reason}): from now on ranks wait for them")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = theirs, self._drawing, torch.get_num_threads()
        self._process = context.Process(target=_serve, args=arguments, name="preview")
        self._process.start()
        theirs.close()  # else its end would not be seen

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None and self._process.pid is not None:
            self._process.kill()
            self._process.join()
            shutil.rmtree(self._drawing.model, ignore_errors=True)
        self._connection, self._process, self._since = None, None, None


def _serve(connection: Connection, drawing: _Drawing, threads: int) -> None:
    """The process: one answer for each checkpoint that it is sent."""
    ignore_stop_signals()
    os.nice(NICENESS)
    torch.set_num_threads(threads)  # sums, and so figures, are those of rank 0
    while True:
        try:
            checkpoint = connection.recv()
        except EOFError:
            return
        answer: _Drawn | _NoRoom
        try:
            _leave_room()
            answer = drawing.of(checkpoint)
        except RuntimeError as error:  # the GPU's, out of memory among them
            answer = _NoRoom(_reason(error))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # training has the device to itself until the next one
        connection.send(answer)


def _leave_room() -> None:
    """Limit this process to what is free on its GPU, less a margin.

    Raises:
        RuntimeError: nothing is, or another process may not use the GPU.
    """
    device = launch.device()
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    share = (free + torch.cuda.memory_reserved(device)) / total - MARGIN
    if share <= 0:
        raise torch.OutOfMemoryError(f"{free / 2**30:.1f} GiB of the GPU are free")
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _warn_of(checkpoint: Path, reason: str) -> None:
    warn(f"no preview of the checkpoint of step {checkpoint_step(checkpoint)} ({reason})")
