"""Pictures and figures of new checkpoints while a run goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from digit_ds.training.export import export
from digit_ds.training.metrics import Reporter, warn
from digit_ds.training.settings import ExportSettings
from digit_ds.training.stored import checkpoint_step

SampleGrid = Callable[[Path], Tensor]
"""Draws samples of a released model directory as one picture [3, H, W]."""
Figures = Callable[[Path], dict[str, float]]
"""What to log of a released model directory."""


class Preview:
    """Exports each new checkpoint and logs what the given functions make of it. Works on rank 0.

    No random number is drawn that training uses, and a failure is a warning: a run that trains well does not end for a
    picture.
    """

    def __init__(self, run: Path, average: bool, sample_grid: SampleGrid | None, figures: Figures | None) -> None:
        self._model, self._average = run / ".preview", average
        self._sample_grid, self._figures = sample_grid, figures

    def show(self, checkpoints: list[Path], report: Reporter) -> None:
        """Log grid and figures of ``checkpoints``."""
        if self._sample_grid is None and self._figures is None:
            return
        for path in checkpoints:
            step = checkpoint_step(path)
            shutil.rmtree(self._model, ignore_errors=True)
            try:
                export(ExportSettings(run=str(path), out=str(self._model), ema=self._average))
                if self._sample_grid is not None:
                    report.image("samples", self._sample_grid(self._model), step)
                if self._figures is not None:
                    report.log({"step": step, **self._figures(self._model)})
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                warn(f"no preview of the checkpoint of step {step} ({type(error).__name__}: {reason})")
            finally:
                shutil.rmtree(self._model, ignore_errors=True)
