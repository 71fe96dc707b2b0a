"""Which updates were skipped because their gradient was not finite, learned without making the host wait."""

import math
from collections import deque

import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.training.stored import Progress


class SkipGuard:
    """Reads each step's gradient norm one step late, when its copy to the host has long arrived.

    The update itself was already skipped on the device (``GuardedAdamW``) or by DeepSpeed; here it is counted. All
    ranks read the same norm, so all come to the same decision.
    """

    def __init__(self, progress: Progress, limit: int) -> None:
        self._progress, self._limit = progress, limit
        self._unread: deque[tuple[int, Tensor | float, torch.cuda.Event | None, list[str]]] = deque()

    def note(self, step: int, norm: Tensor | float, image_ids: list[str]) -> None:
        """Remember the norm of a step and the images of this rank's batch."""
        event = None
        if isinstance(norm, Tensor) and norm.is_cuda:
            host = torch.empty((), dtype=torch.float32, pin_memory=True)
            host.copy_(norm.float().reshape(()), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            norm = host
        self._unread.append((step, norm, event, image_ids))

    def read(self, keep: int) -> list[str]:
        """Count the skipped updates among all but the ``keep`` newest steps; one message for each.

        Raises:
            Diverged: too many in a row.
        """
        messages = []
        while len(self._unread) > keep:
            step, norm, event, image_ids = self._unread.popleft()
            if event is not None:
                event.synchronize()
            value = float(norm)
            if math.isfinite(value) and value >= 0:
                self._progress.skipped_in_a_row = 0
                continue
            self._progress.skipped += 1
            self._progress.skipped_in_a_row += 1
            messages.append(f"step {step}: gradient not finite, update skipped; images of this rank: {image_ids}")
            if self._progress.skipped_in_a_row >= self._limit:
                raise Diverged(step, self._limit, messages)
        return messages


class Diverged(UserError):
    """Too many skipped updates in a row."""

    def __init__(self, step: int, limit: int, messages: list[str]) -> None:
        super().__init__(
            f"stopped at step {step}: {limit} updates in a row had gradients that are not finite; resume from the last "
            "checkpoint with --change optimizer.learning_rate=VALUE (lower), --change schedule.warmup_steps=VALUE "
            "(longer) or --skip-batches N, which skips the images named above"
        )
        self.messages = messages
