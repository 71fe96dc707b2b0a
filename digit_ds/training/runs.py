"""The run directory: whose results it holds, and what model a recipe and its shards make."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from digit_ds.config import Recipe, load_recipe
from digit_ds.data.shards import ShardManifest
from digit_ds.errors import UserError
from digit_ds.files import write_atomically
from digit_ds.identity import TOKENS, VQ, check_agreement, check_classes
from digit_ds.lock import is_empty
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.schedule import default_warmup

_MAY_CHANGE = (
    "run",
    "deepspeed",
    "data.shards",
    "data.cache",
    "data.validation",
    "data.workers",
    "training.steps",
    "training.micro_batch",
    "training.recompute",
    "training.compile",
    "training.max_skipped",
    "training.timeout_seconds",
    "parallel",
    "checkpoint",
    "monitor",
    "preview",
)
"""What may differ when a run is continued: where, how fast and how long it runs, what it writes."""


def recipe_text(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


_CHANGEABLE = (
    "model.dropout",
    "optimizer",
    "schedule",
    "training.global_batch",
    "training.label_smoothing",
    "training.class_dropout",
    "training.order_anneal",
    "training.precision",
    "training.ema_decay",
)
"""What may differ with ``--change``: the course of the run, not the meaning of its state."""


class Difference(NamedTuple):
    """A key of the recipe whose value is no longer that of the run's last start."""

    key: str
    old: Any
    new: Any


def check_run_directory(run: Path, recipe: Recipe, changes: Sequence[str] = ()) -> list[Difference]:
    """Refuse a directory that holds something else's or another recipe's results; what differs and may.

    Args:
        run: the run directory.
        recipe: what it is to go on with.
        changes: keys (``section.key``) named by ``--change``.
    """
    stored = run / "recipe.yaml"
    if not stored.exists():
        if run.exists() and not (run.is_dir() and is_empty(run)):
            raise UserError(f"{run}: exists and holds no recipe.yaml, expected a new directory or a run to continue")
        return []
    before = begun_with(load_recipe(stored))
    old, new = _flat(before.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    differences = []
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key != "model.kind", key)):
        if old.get(key) == new.get(key) or (key == "data.order" and new[key] == "auto"):  # which takes the run's
            continue
        differences.append(Difference(key, old.get(key), new.get(key)))
        if _is_among(key, _MAY_CHANGE):
            continue
        found = f"({key} is {old.get(key)} there and {new.get(key)} here)"
        if not _is_among(key, _CHANGEABLE):
            raise UserError(f"{run}: holds the results of another recipe {found}, choose another run directory")
        if key not in changes:
            raise UserError(
                f"{run}: holds the results of another recipe {found}, choose another run directory, or continue with "
                f"--change {key}={json.dumps(new.get(key))} to accept the change"
            )
    steps = old.get("training.steps"), new["training.steps"]
    if old.get("schedule.name") == "cosine" and steps[0] != steps[1] and "training.steps" not in changes:
        raise UserError(
            f"{run}: training.steps was {steps[0]}, and a cosine schedule cannot change its end; --change "
            f"training.steps={steps[1]} changes it nevertheless"
        )
    return differences


def settle(recipe: Recipe) -> Recipe:
    """The recipe with what it leaves open: as the run that it continues began, else the default of a new run.

    These are ``schedule.warmup_steps`` and ``data.order``.
    """
    stored = Path(recipe.run) / "recipe.yaml"
    before = begun_with(load_recipe(stored)) if stored.is_file() else None
    schedule, data = recipe.schedule, recipe.data
    if schedule.warmup_steps is None:
        number = before.schedule.warmup_steps if before else None
        number = default_warmup(recipe.training.steps) if number is None else number
        schedule = schedule.model_copy(update={"warmup_steps": number})
    if data.order == "auto":
        data = data.model_copy(update={"order": before.data.order if before else "keyed"})
    return recipe.model_copy(update={"schedule": schedule, "data": data})


def begun_with(stored: Recipe) -> Recipe:
    """A run's recipe as it stands in its directory: a key that is younger than the run means what the run did.

    Defaults are that, but for ``data.order``, which a run since then never leaves at ``auto``.
    """
    if stored.data.order != "auto":
        return stored
    return stored.model_copy(update={"data": stored.data.model_copy(update={"order": "permutation"})})


def _is_among(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def write_recipe(run: Path, recipe: Recipe) -> None:
    """Leave the recipe in its run directory."""
    text = recipe_text(recipe)
    write_atomically(run / "recipe.yaml", lambda path: path.write_text(text, encoding="utf-8"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> ``section.key``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def model_spec(recipe: Recipe, manifest: ShardManifest) -> TransformerSpec:
    """The model of a recipe over the tokens of a shard set.

    Raises:
        UserError: the shards lack what this kind of model reads.
    """
    model, shards = recipe.model, recipe.data.shards
    if model.kind != "prior" and not manifest.vq_codes:
        raise UserError(f"{shards}: has no VQ tokens, which model.kind {model.kind} needs")
    if model.class_conditional and not manifest.classes:
        raise UserError(f"{shards}: has no classes, which model.class_conditional needs")
    spec = TransformerSpec(
        **model.architecture,
        discriminative_codes=manifest.discriminative_codes if model.kind != "vq" else 0,
        vq_codes=manifest.vq_codes if model.kind != "prior" else 0,
        classes=len(manifest.classes) if model.class_conditional else 0,
        grid=(manifest.grid[0], manifest.grid[1]),
        target_positions=recipe.training.order == "random",
    )
    if spec.positions == "learned" and spec.max_positions < spec.tokens + 1:
        raise UserError(
            f"model.max_positions is {spec.max_positions}, expected at least {spec.tokens + 1} for the shards' grid"
        )
    return spec


def check_shards(recipe: Recipe, training: ShardManifest, validation: ShardManifest | None) -> None:
    """Refuse validation shards whose tokens or labels mean something else than those of the training shards.

    Raises:
        UserError: names both and what differs.
    """
    if validation is None:
        return
    ours, theirs = training.part(recipe.data.shards), validation.part(str(recipe.data.validation))
    check_agreement([ours, theirs], VQ if recipe.model.kind == "vq" else TOKENS)
    if recipe.model.class_conditional:
        check_classes([ours, theirs])
    for name in ("grid", "discriminative_codes", "vq_codes"):
        own, other = getattr(training, name), getattr(validation, name)
        if own != other and not (name == "vq_codes" and recipe.model.kind == "prior"):
            raise UserError(f"{ours.name}: {name} is {own}, but {theirs.name} has {other}; they must be the same")


def provenance(recipe: Recipe, manifest: ShardManifest) -> dict[str, Any]:
    """What a model of this run was made from, see :mod:`digit_ds.identity`."""
    known = dict(manifest.identity)
    if recipe.model.class_conditional:
        known["class_dropout"] = recipe.training.class_dropout
    return known
