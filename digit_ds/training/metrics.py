"""What a run says about itself: ``metrics.jsonl``, TensorBoard, the progress line; the peak of a device."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from digit_ds.files import write_atomically
from digit_ds.parallel import launch
from digit_ds.parallel.progress import progress
from digit_ds.training.flops import PEAKS

_BOARD = {
    "loss": ("loss", "nll"),
    "validation": ("validation_nll",),
    "tokens": ("token_usage",),
    "update": ("grad_norm", "lr", "skipped_updates"),
    "speed": ("images_per_second", "tokens_per_second", "tflops", "mfu", "memory_gib"),
    "seconds_a_step": ("step_seconds", "step_seconds_p50", "step_seconds_p95", "data_wait_seconds"),
    "ranks": ("rank_seconds_max", "rank_seconds_median", "slowest_rank"),
    "progress": ("images", "epoch", "training_seconds"),
}
"""Sections of TensorBoard and the metrics in them."""
_TAGS = {name: f"{section}/{name}" for section, names in _BOARD.items() for name in names}


def warn(*messages: str) -> None:
    """Warnings about this rank's data, from every rank that has any."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def peak_tflops(stated: float | None) -> float | None:
    """Peak of one device: as the recipe states, else by its name; None: unknown."""
    if stated is not None or not torch.cuda.is_available():
        return stated
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Reporter:
    """Writes on rank 0; the other ranks hold one that does nothing. Lines may come from any thread."""

    def __init__(self, run: Path, step: int, steps: int, recipe_text: str) -> None:
        self.path = run / "metrics.jsonl"
        self.active = launch.is_main()
        self._lock = threading.Lock()
        self._bar = progress(total=steps, initial=step, description=run.name, unit="steps")
        if self.active:
            self._forget_after(step)
            self._board = SummaryWriter(str(run / "tb"), purge_step=step + 1)
            self._board.add_text("recipe", f"```yaml\n{recipe_text}\n```", step)

    def _forget_after(self, step: int) -> None:
        """Drop lines of steps after the checkpoint that is resumed from: they come again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # cut off by a kill
        text = "".join(kept)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def advance(self) -> None:
        """One step is done."""
        self._bar.update(1)

    def log(self, values: dict[str, Any]) -> None:
        """Append one line of metrics (``step`` among them); numbers that are not finite become null."""
        with self._lock:
            if self.active:
                self._log(values)

    def _log(self, values: dict[str, Any]) -> None:
        clean = {key: _clean(value) for key, value in values.items()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(clean) + "\n")
        for key, value in clean.items():
            if isinstance(value, int | float) and key != "step":
                self._board.add_scalar(_TAGS.get(key, key), value, values["step"])
        if "loss" in clean:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {values['images_per_second']:,.0f} images/s"
                + (f", MFU {values['mfu']:.1%}" if values.get("mfu") else ""),
                refresh=False,
            )

    def image(self, name: str, pixels: torch.Tensor, step: int) -> None:
        """A picture uint8 or float [3, H, W] for TensorBoard."""
        if self.active:
            self._board.add_image(name, pixels, step)

    def say(self, text: str) -> None:
        """A human-readable line above the progress bar."""
        if self.active:
            self._bar.write(text)

    def close(self) -> None:
        """Flush everything; what a thread logs from then on is not written."""
        with self._lock:
            self._bar.close()
            if self.active:
                self._board.close()
            self.active = False


def _clean(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Wall clock of the steps since the last logged one: step times and the share spent waiting for data."""

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._waits = 0.0
        self._last = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (a validation, a checkpoint) is not step time."""
        begin = time.perf_counter()
        yield
        self._last += time.perf_counter() - begin

    def waited(self, seconds: float) -> None:
        """Time spent waiting for a batch."""
        self._waits += seconds

    def tick(self) -> float:
        """A step is done; its seconds."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._steps.append(seconds)
        return seconds

    def summary(self, global_batch: int, tokens: int) -> dict[str, float]:
        """Rates over the steps since the last call."""
        steps, waits = np.array(self._steps), self._waits
        self._steps, self._waits = [], 0.0
        rate = global_batch * len(steps) / steps.sum()
        return {
            "images_per_second": float(rate),
            "tokens_per_second": float(rate * tokens),
            "step_seconds": float(steps.mean()),
            "step_seconds_p50": float(np.percentile(steps, 50)),
            "step_seconds_p95": float(np.percentile(steps, 95)),
            "data_wait_seconds": waits / len(steps),
        }


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: the device's allocator, or the resident set where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
