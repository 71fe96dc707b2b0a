"""Learning rate and token order as functions of the number of updates done: nothing to save, nothing to restore."""

import math

from digit_ds.config import Recipe

PUBLISHED_WARMUP = 6250


def default_warmup(steps: int) -> int:
    """Warm-up of a run of ``steps`` whose recipe does not say it: a twentieth, at most that of the published runs."""
    return min(PUBLISHED_WARMUP, -(-steps // 20))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of the update after ``step`` updates (0 for the first).

    All shapes begin with ``warmup_steps`` updates on the line from ``warmup_start`` to the peak. Then

    - ``inverse_sqrt``: peak x sqrt(warmup / step), fairseq's;
    - ``cosine``: from the peak to ``minimum`` at the last step along half a cosine;
    - ``warmup_stable_decay``: the peak, and in the last ``decay_steps`` the line down to ``minimum``;
    - ``constant``: the peak.
    """
    schedule, peak, last = recipe.schedule, recipe.optimizer.learning_rate, recipe.training.steps
    warmup, minimum = schedule.warmup_steps, schedule.minimum
    if warmup is None:
        warmup = default_warmup(last)
    if step < warmup:
        return schedule.warmup_start + (peak - schedule.warmup_start) * step / warmup
    match schedule.name:
        case "inverse_sqrt":
            return peak * math.sqrt(max(warmup, 1) / max(step, 1))
        case "cosine":
            share = min(1.0, (step - warmup) / max(1, last - warmup))
            return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * share))
        case "warmup_stable_decay":
            left = max(0, last - step)
            return minimum + (peak - minimum) * min(1.0, left / max(1, schedule.decay_steps))
        case _:
            return peak


def random_order_share(recipe: Recipe, step: int) -> float:
    """Share of images whose tokens are written in a random order in the update after ``step`` updates.

    1 up to the first step of ``training.order_anneal``, 0 from the last one on, linear between (RAR, arXiv 2411.00776,
    section 3.3); 0 for raster order.
    """
    if recipe.training.order_anneal is None:
        return 0.0
    first, last = recipe.training.order_anneal
    if step < first:
        return 1.0
    return max(0.0, (last - step) / (last - first)) if step < last else 0.0
