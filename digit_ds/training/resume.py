"""How a run begins: which checkpoint it resumes from, and the changes given on the command line.

Rank 0 decides, all ranks follow. What was decided is appended to ``RUN/history.jsonl``.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from digit_ds.config import Recipe
from digit_ds.data.shards import ShardManifest
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.identity import DISCRIMINATIVE, TOKENS, VQ, Part, check_agreement, check_classes
from digit_ds.model import weights
from digit_ds.model.partition import weight_files
from digit_ds.model.released import read_config
from digit_ds.model.spec import TransformerSpec
from digit_ds.parallel import launch
from digit_ds.parallel.decide import fail_together, from_main, gather
from digit_ds.parallel.topology import Topology
from digit_ds.training.checkpoint import clear_unfinished, write_latest
from digit_ds.training.engine import Engine
from digit_ds.training.history import record
from digit_ds.training.runs import Difference, provenance, write_recipe
from digit_ds.training.stored import (
    Damaged,
    Progress,
    StoredState,
    checkpoint_name,
    checkpoint_step,
    incompleteness,
    is_complete,
    walk_lineage,
)

SEEN_SECONDS = 10.0
"""Seconds until a checkpoint of rank 0 must be visible on all ranks: network file systems cache attributes."""


@dataclass(frozen=True)
class Changes:
    """What the user states explicitly when a run is continued."""

    keys: tuple[str, ...] = ()
    """Keys of the recipe (``section.key``) that may differ from those that the run was begun with."""
    rollback: int | None = None
    """Step of an earlier checkpoint to go on from; what came after it is abandoned."""
    skip_batches: int = 0
    """Global batches of the data order to pass over."""

    def once(self) -> "Changes":
        """Without what a job that Slurm starts again must not do again."""
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            return self
        return Changes(self.keys)


NO_CHANGES = Changes()


class Beginning(NamedTuple):
    """What the steps of a run start from, the same on every rank but for the engine's state."""

    engine: Engine
    progress: Progress
    provenance: dict[str, Any]
    """Of the shards, and of the model that the run was started from."""
    parent: int | None
    """Step of the checkpoint that was resumed from."""


def begin(
    recipe: Recipe,
    manifest: ShardManifest,
    spec: TransformerSpec,
    place: Topology,
    device: torch.device,
    changes: Changes,
    differences: Iterable[Difference],
) -> Beginning:
    """Build the engine and fill it, from the run's checkpoint or with new weights, and record which."""
    run = Path(recipe.run)
    stored = choose_checkpoint(run, changes.rollback)
    origin = provenance(recipe, manifest)
    if stored is None:
        if recipe.training.start_from is not None:
            origin["start_from"] = from_main(lambda: start_provenance(recipe, manifest))
        engine, progress = Engine(recipe, spec, place, device), Progress()
    else:
        before = stored.manifest.get("provenance", {})
        said = "data.shards" in changes.keys
        from_main(lambda: check_shards(before, manifest, recipe, stored.path, said))
        if "start_from" in before:
            origin["start_from"] = before["start_from"]
        engine = Engine(recipe, spec, place, device, resumes=True)
        progress = restore(engine, stored)
    skipped = changes.skip_batches * recipe.training.global_batch
    progress.images += skipped

    def write() -> None:
        write_recipe(run, recipe)
        for difference in differences:
            record(run, "change", progress.step, **difference._asdict())
        if skipped:
            record(run, "skip", progress.step, batches=changes.skip_batches, images=skipped)
        layout = {"tensor": place.tensor_size, "data": place.data_size}
        event = "start" if stored is None else "resume"
        record(run, event, progress.step, layout=layout, shards_sha256=manifest.index_sha256)

    from_main(write)
    return Beginning(engine, progress, origin, None if stored is None else progress.step)


def start_provenance(recipe: Recipe, manifest: ShardManifest) -> dict[str, Any]:
    """Of the model that a run starts from: path, content hash and its own provenance.

    Raises:
        UserError: its tokens are not those of the shards.
    """
    source = str(recipe.training.start_from)
    _, before, _ = read_config(Path(source))
    _check_tokens(recipe, Part(f"model {source}", before), manifest.part(recipe.data.shards))
    hashes = [sha256(path) for path in weight_files(source)]
    content = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {"path": source, "sha256": content, "provenance": before}


def choose_checkpoint(run: Path, rollback: int | None) -> StoredState | None:
    """The newest undamaged checkpoint of the run's lineage or the one to roll back to; None: the run is new.

    Every file is hashed once, each rank takes a share.

    Raises:
        UserError: there are checkpoints but none can be used, or a rank does not see what rank 0 sees.
    """
    folder = run / "checkpoints"
    names = from_main(lambda: _candidates(run, folder, rollback))
    for number, name in enumerate(names):
        path = folder / name
        fail_together(_unseen(path))
        stored, problem = None, None
        try:
            stored = StoredState(path)
            stored.verify(launch.rank(), launch.world_size())
        except Damaged as error:
            problem = str(error)
        problems = [found for found in gather(problem) if found]
        if not problems:
            from_main(partial(_settle, run, folder, name, rollback))
            return stored
        if rollback is not None or number + 1 == len(names):
            fail_together(f"{problems[0]}; no other checkpoint can be used")
        from_main(partial(_warn, run, path, problems[0]))
    return None


def _candidates(run: Path, folder: Path, rollback: int | None) -> list[str]:
    """Rank 0: names of the checkpoints to try, best first."""
    clear_unfinished(folder)
    if rollback is not None:
        path = folder / checkpoint_name(rollback)
        if not is_complete(path):
            steps = sorted(checkpoint_step(path) for path in folder.glob("step_*") if is_complete(path))
            raise UserError(f"{run}: has no checkpoint of step {rollback} to roll back to, expected one of {steps}")
        return [path.name]
    found = list(walk_lineage(folder))
    names = [path.name for path, problem in found if problem is None]
    if found and not names:
        raise UserError(f"{found[0][1]}; no checkpoint in {folder} is complete, remove it to start a new run")
    for path, problem in found:
        if problem is None:
            break
        _warn(run, path, problem)
    return names


def _settle(run: Path, folder: Path, name: str, rollback: int | None) -> None:
    """Rank 0: ``latest`` names the chosen one, whose lineage alone counts from now on."""
    newest = next(iter(walk_lineage(folder)), (None, None))[0]
    if newest is not None and newest.name != name:
        write_latest(folder, name)
        if rollback is not None:
            record(run, "rollback", rollback, abandoned=checkpoint_step(newest))


def _warn(run: Path, checkpoint: Path, problem: str) -> None:
    print(f"warning: {problem}; the checkpoint before it is tried", file=sys.stderr, flush=True)
    record(run, "fallback", checkpoint_step(checkpoint), problem=problem)


def _unseen(checkpoint: Path) -> str | None:
    """What is missing on this rank of a checkpoint that is complete on rank 0; None: nothing."""
    end = time.monotonic() + SEEN_SECONDS
    while (problem := incompleteness(checkpoint)) is not None and time.monotonic() < end:
        time.sleep(0.2)
    if problem is None:
        return None
    return f"rank {launch.rank()} ({launch.host()}) does not see what rank 0 sees: {problem}"


def restore(engine: Engine, stored: StoredState) -> Progress:
    """Fill the engine from a checkpoint of any layout; a rank reads and holds what it owns and one piece more.

    Raises:
        UserError: the checkpoint belongs to another model, or copies of one parameter differ by more than rounding.
    """
    if stored.spec != engine.model.spec:
        fail_together(f"{stored.path}: belongs to another model than this recipe and these shards make")
    kinds, topology = stored.kinds(), engine.topology
    table = {parameter.name: parameter for parameter in weights.parameters(stored.spec)}

    def read(kind: str, name: str, start: int, end: int):
        source = kind if kind in kinds else "weight"  # a moving average that begins now begins at the weights
        return stored.piece(source, table[name], topology.tensor_size, topology.tensor_rank, start, end)

    engine.restore(read, stored.progress.adam_steps)
    return stored.progress


def check_shards(
    before: Mapping[str, Any], manifest: ShardManifest, recipe: Recipe, checkpoint: Path, said: bool
) -> None:
    """Refuse to go on with tokens that mean something else, or with other images unless the user states it.

    Args:
        before: provenance in the checkpoint; what an older one does not hold is not compared.
        manifest: of the shards.
        recipe: names them.
        checkpoint: its name for messages.
        said: whether ``--change data.shards=...`` was given.

    Raises:
        UserError: names both and what differs.
    """
    shards = recipe.data.shards
    _check_tokens(recipe, Part(f"checkpoint {checkpoint}", before), manifest.part(shards))
    old, new = before.get("shards_sha256"), manifest.index_sha256
    if old is not None and old != new and not said:
        raise UserError(
            f"{shards}: holds other samples (index {new[:12]}) than those of checkpoint {checkpoint} ({old[:12]}); "
            f"to accept them, continue with --change data.shards={shards}"
        )


def _check_tokens(recipe: Recipe, *parts: Part) -> None:
    """Refuse parts whose tokens or, where the model reads them, classes differ."""
    keys = {"prior": DISCRIMINATIVE, "vq": VQ}.get(recipe.model.kind, TOKENS)
    check_agreement(parts, keys)
    if recipe.model.class_conditional:
        check_classes(parts)
