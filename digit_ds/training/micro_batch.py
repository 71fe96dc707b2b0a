"""``training.micro_batch: auto``: the largest that divides the batch of a rank and fits into its memory."""

import os
import sys
from pathlib import Path

import torch
import yaml

from digit_ds.config import Recipe
from digit_ds.model.spec import TransformerSpec
from digit_ds.parallel.decide import from_main, gather
from digit_ds.parallel.launch import local_world_size
from digit_ds.training.estimate import largest, with_micro_batch


def settle(recipe: Recipe, spec: TransformerSpec, data_size: int, device: torch.device) -> Recipe:
    """The recipe with a number for ``training.micro_batch``; all ranks get the same one, which rank 0 prints.

    A run that is continued keeps its number, on which dropout masks depend, while that still divides the batch of a
    rank.

    Raises:
        UserError: not even one image fits.
    """
    if recipe.training.micro_batch != "auto":
        return recipe
    memory = min(gather(_memory_gib(device)))
    return with_micro_batch(recipe, from_main(lambda: _settle(recipe, spec, data_size, memory)))


def _settle(recipe: Recipe, spec: TransformerSpec, data_size: int, memory: float) -> int:
    before, rank_batch = _recorded(Path(recipe.run)), recipe.training.global_batch // data_size
    if before is not None and rank_batch % before == 0:
        _say(f"{before}, as this run began")
        return before
    chosen = largest(recipe, spec, data_size, memory)
    changed = "" if before is None else f"; it was {before}, which does not divide that: dropout masks change"
    _say(f"{chosen} of {rank_batch} images of a rank, for {memory:.1f} GiB of memory{changed}")
    return chosen


def _say(text: str) -> None:
    print(f"training.micro_batch is {text}", file=sys.stderr, flush=True)


def _recorded(run: Path) -> int | None:
    """The number with which a run began, from the recipe in its directory."""
    stored = run / "recipe.yaml"
    if not stored.is_file():
        return None
    number = yaml.safe_load(stored.read_text(encoding="utf-8"))["training"]["micro_batch"]
    return number if isinstance(number, int) else None


def _memory_gib(device: torch.device) -> float:
    """Memory of this rank's device; of a CPU, its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return pages / max(1, local_world_size())
