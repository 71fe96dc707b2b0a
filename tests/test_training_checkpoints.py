"""Checkpoints: the commit protocol, from which one a run continues, and explicit changes of the recipe."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import export
from safetensors.torch import load_file, save_file
from training_parts import launch, metrics, recipe, small_messages, start, train, whole_state, write_shards

from digit_ds.config import Recipe
from digit_ds.data.shards import read_manifest
from digit_ds.errors import UserError, run_command
from digit_ds.files import sha256, write_atomically
from digit_ds.model.released import read_model, save_model
from digit_ds.model.weights import parameters, shard_shape, unshard
from digit_ds.training.resume import Changes
from digit_ds.training.stored import StoredState, is_complete, newest_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train_with(values: Recipe, changes: Changes) -> None:
    from digit_ds.training import loop

    run_command(lambda _arguments: loop.train(values, changes=changes), [])


def history(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def events(run: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in history(run)]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


# --- commit ------------------------------------------------------------------------------------------------------


def train_with_failing_commits(values: Recipe, how: str, step: int) -> None:
    """On rank 0 the commit of ``step`` fails: full disk, a rename refused, or a part without hash."""
    from digit_ds.training import checkpoint

    write_json, move = checkpoint.write_json, Path.replace
    name = f".step_{step:08d}.partial"

    def limited(path, value):
        if Path(path).name != "manifest.json" or Path(path).parent.name != name:
            return write_json(path, value)
        return write_atomically(path, lambda _temporary: Path("/dev/full").write_text("more than there is room for"))

    def refused(self, target):
        if self.name == name:
            raise OSError(5, "Input/output error")
        return move(self, target)

    def lost(path, value):
        if Path(path).parent.name == name and Path(path).name == "tensor-0.data-1.json":
            return None
        return write_json(path, value)

    if how == "full":
        checkpoint.write_json = limited
    elif how == "rename":
        Path.replace = refused
    else:
        checkpoint.write_json = lost
    run_command(lambda _arguments: train(values), [])


@pytest.mark.fault(
    "manifest or rename of a checkpoint fails",
    stage="training",
    outcome="warning that says which; training goes on and the last good checkpoint stays",
    status="-",
    lost="that checkpoint",
)
@pytest.mark.parametrize(
    ("how", "reason"),
    [("full", "No space left"), ("rename", "Input/output error"), ("lost", "tensor-0.data-1.json")],
)
def test_a_commit_that_fails_leaves_the_last_good_checkpoint_and_training_goes_on(how, reason, token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=6, checkpoint__every=2, checkpoint__keep_last=9)
    group = start(train_with_failing_commits, (values, how, 4), 2, tmp_path / "log")
    assert group.wait() == [0, 0], group.output()
    (warning,) = re.findall(r"warning: the checkpoint of step 4 [^\r\n]*", group.output())
    assert reason in warning and "the last complete checkpoint stays" in warning
    assert names(tmp_path / "run") == ["latest", "step_00000002", "step_00000006"]
    assert StoredState(tmp_path / "run" / "checkpoints" / "step_00000006").manifest["parent"] == 2
    assert "Traceback" not in group.output()


@pytest.mark.fault(
    "the last save of a run fails",
    stage="training",
    outcome="one line; no success is reported and export takes nothing older silently",
    status="2",
    lost="steps since the last checkpoint",
)
@pytest.mark.parametrize("how", ["full", "rename"])
def test_a_last_save_that_fails_is_no_success(how, token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=4, checkpoint__every=2)
    group = start(train_with_failing_commits, (values, how, 4), 2, tmp_path / "log")
    assert group.wait() == [2, 2], group.output()
    (error,) = error_lines(group.output())
    assert "the checkpoint of step 4 could not be written" in error
    assert names(tmp_path / "run") == ["latest", "step_00000002"]
    export(tmp_path / "run", tmp_path / "model")
    assert read_model(tmp_path / "model").provenance["steps"] == 2
    launch(train, (values,), 2, tmp_path / "log-again")
    assert names(tmp_path / "run") == ["latest", "step_00000002", "step_00000004"]


@pytest.mark.fault(
    "a part of a checkpoint is missing",
    stage="training, export",
    outcome="the directory counts as incomplete and is passed over",
    status="-",
    lost="that checkpoint",
)
def test_a_checkpoint_without_a_part_of_every_rank_is_incomplete(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=2)
    launch(train, (values,), 2, tmp_path / "log")
    path = tmp_path / "run" / "checkpoints" / "step_00000002"
    manifest = json.loads((path / "manifest.json").read_text())
    assert is_complete(path) and len(manifest["files"]) == 2
    del manifest["files"]["tensor-0.data-1.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert not is_complete(path)
    group = start(train_with, (values, Changes()), 2, tmp_path / "log-again")
    assert group.wait() == [2, 2]
    (error,) = error_lines(group.output())
    assert "names 1 parts, expected one of each of 2 ranks" in error


# --- lineage -----------------------------------------------------------------------------------------------------


def test_after_rolling_back_the_new_branch_is_kept_and_the_old_one_is_not_resumed(token_shards, tmp_path):
    run = tmp_path / "run"
    options = {"checkpoint__every": 4, "checkpoint__keep_every": 4, "checkpoint__keep_last": 1}
    values = recipe(run, token_shards, training__steps=12, **options)
    launch(train, (values,), 1, tmp_path / "log")
    assert names(run) == ["latest", *(f"step_{step:08d}" for step in (4, 8, 12))]
    # By hand, as it was always possible: the next save has a lower step than the abandoned ones.
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    shorter = recipe(run, token_shards, training__steps=6, **options | {"checkpoint__keep_every": 0})
    launch(train, (shorter,), 1, tmp_path / "log-by-hand")
    assert names(run) == ["latest", "step_00000006"]
    launch(train, (values,), 1, tmp_path / "log-on")
    assert events(run)[-1] == ("resume", 6) and names(run)[-1] == "step_00000012"

    group = start(train_with, (values, Changes(rollback=4)), 1, tmp_path / "log-none")
    assert group.wait() == [2]
    assert "has no checkpoint of step 4 to roll back to, expected one of [8, 12]" in group.output()
    group = start(train_with, (values, Changes(rollback=8)), 1, tmp_path / "log-back")
    assert group.wait() == [0], group.output()
    assert events(run)[-2:] == [("rollback", 8), ("resume", 8)] and history(run)[-2]["abandoned"] == 12
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))
    assert StoredState(run / "checkpoints" / "step_00000012").manifest["parent"] == 8


def test_batches_may_be_passed_over(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=2)
    launch(train, (values,), 1, tmp_path / "log")
    group = start(
        train_with, (recipe(tmp_path / "run", token_shards, training__steps=3), Changes(skip_batches=2)), 1, tmp_path
    )
    assert group.wait() == [0], group.output()
    assert [line["images"] for line in metrics(tmp_path / "run")] == [8, 16, 40]
    straight = recipe(tmp_path / "straight", token_shards, training__steps=5)
    launch(train, (straight,), 1, tmp_path / "log-straight")
    hashes = [int(line["sample_ids_hash"], 16) for line in metrics(tmp_path / "straight")]
    chained = [int(line["sample_ids_hash"], 16) for line in metrics(tmp_path / "run")]
    batch = (hashes[4] - hashes[3] * 6364136223846793005) % 2**64  # samples of the fifth step
    assert chained[2] == (chained[1] * 6364136223846793005 + batch) % 2**64
    assert ("skip", 2) in events(tmp_path / "run")


# --- damage, views, older formats --------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 255
    path.write_bytes(data)


def train_with_own_views(values: Recipe, folders: list[Path]) -> None:
    """The run directory is relative, and each rank has another working directory."""
    from digit_ds.parallel import launch as place

    os.chdir(folders[place.rank()])
    run_command(lambda _arguments: train(values), [])


@pytest.mark.fault(
    "the newest checkpoint is damaged; ranks see different checkpoints",
    stage="training",
    outcome="warning that names the file; the one before is used; all ranks follow rank 0",
    status="-",
    lost="steps since that one",
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_ranks_follow_rank_0(token_shards, tmp_path):
    run = tmp_path / "run"
    options = {"checkpoint__every": 4, "checkpoint__keep_last": 9}
    straight = recipe(tmp_path / "straight", token_shards, training__steps=10, **options)
    launch(train, (straight,), 2, tmp_path / "log-straight")
    launch(train, (recipe(run, token_shards, training__steps=8, **options),), 2, tmp_path / "log")
    # On rank 1 the file system is in another state: there the checkpoint of step 4 is the newest.
    shutil.copytree(run, tmp_path / "older" / "run")
    (tmp_path / "older" / "run" / "checkpoints" / "latest").write_text("step_00000004\n")
    cache = str(tmp_path / "cache")  # the default one depends on the absolute path
    relative = recipe(Path("run"), token_shards, training__steps=8, data__cache=cache, **options)
    views = relative, [tmp_path, tmp_path / "older"]
    group = start(train_with_own_views, views, 2, tmp_path / "log-views")
    assert group.wait() == [0, 0], group.output()
    assert events(run)[-1] == ("resume", 8) and "already at step 8 of 8" in group.output()

    damaged = run / "checkpoints" / "step_00000008" / "tensor-0.data-1.safetensors"
    flip(damaged)
    output = launch(train, (recipe(run, token_shards, training__steps=10, **options),), 2, tmp_path / "log-damaged")
    (warning,) = re.findall(r"^warning: .*is damaged.*", output, re.MULTILINE)
    assert str(damaged) in warning
    assert [event for event in events(run) if event[0] != "change"][-2:] == [("fallback", 8), ("resume", 4)]
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(tmp_path / "straight")]
    assert names(run)[:3] == ["latest", "step_00000004", "step_00000008"], "the damaged one was written again"
    StoredState(newest_checkpoint(run / "checkpoints")).verify()

    shutil.rmtree(tmp_path / "older" / "run" / "checkpoints")
    group = start(train_with_own_views, views, 2, tmp_path / "log-blind")
    assert group.wait() == [2, 2]
    (error,) = error_lines(group.output()) or [group.output()]
    assert "rank 1" in error and "does not see what rank 0 sees" in error and "Traceback" not in error


def as_format_1(checkpoint: Path) -> None:
    """What commit 06cd4e0 wrote: the same files, a manifest without parent and pieces."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["parent"]
    for entry in manifest["files"].values():
        del entry["pieces"]
    manifest["provenance"] = {key: manifest["provenance"][key] for key in ("layer", "codebook_sha256")}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))


def joined(stored: StoredState, path: Path) -> bytes:
    """The weights of two tensor-parallel ranks in memory, joined and written by safetensors."""
    spec, parts = stored.spec, []
    for rank in range(2):
        flat = load_file(stored.path / f"tensor-{rank}.data-0.safetensors")
        parts.append({p.name: flat[f"weight/{p.name}"].view(shard_shape(p, 2)) for p in parameters(spec)})
    save_file({name: value.contiguous() for name, value in unshard(parts, spec).items()}, path, {"format": "pt"})
    return path.read_bytes()


def test_checkpoints_of_format_1_are_resumed_and_exported(token_shards, tmp_path):
    options = {"checkpoint__every": 2, "parallel__tensor": 2}
    launch(train, (recipe(tmp_path / "straight", token_shards, training__steps=6, **options),), 2, tmp_path / "log")
    run = tmp_path / "run"
    launch(train, (recipe(run, token_shards, training__steps=4, **options),), 2, tmp_path / "log-run")
    for path in (run / "checkpoints").glob("step_*"):
        as_format_1(path)
    (run / "history.jsonl").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("digit_ds.training.stored.PIECE", 37)  # parameters of this size would be read at once
        export(run, tmp_path / "model")
    assert read_model(tmp_path / "model").provenance["steps"] == 4
    stored = StoredState(run / "checkpoints" / "step_00000004")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == joined(stored, tmp_path / "joined")
    launch(train, (recipe(run, token_shards, training__steps=6, **options),), 2, tmp_path / "log-on")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        ours, theirs = (StoredState(newest_checkpoint(path / "checkpoints")) for path in (run, tmp_path / "straight"))
        expected = whole_state(theirs, kind)
        assert all(torch.equal(value, expected[name]) for name, value in whole_state(ours, kind).items())
    assert names(run) == ["latest", "step_00000004", "step_00000006"]


def nudge(checkpoint: Path, share: float) -> None:
    """Make the second tensor-parallel rank's copy of a bias differ, hashes included."""
    path = checkpoint / "tensor-1.data-0.safetensors"
    from safetensors import safe_open

    header = safe_open(path, framework="pt").metadata()
    tensors = load_file(path)
    for kind in ("weight", "exp_avg_sq"):
        tensor = tensors[f"{kind}/layers.0.attention.out.bias"]
        tensor[0] += tensor.abs().max() * share
    save_file(tensors, path, metadata=header)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][path.name] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.fault(
    "replicated weights differ between tensor-parallel ranks",
    stage="training, export",
    outcome="within rounding: a warning, rank 0's are taken; more: refused",
    status="2 when refused",
    lost="nothing",
)
def test_copies_that_differ_within_rounding_are_accepted_and_larger_differences_refused(token_shards, tmp_path):
    run = tmp_path / "run"
    options = {"parallel__tensor": 2, "checkpoint__every": 2, "checkpoint__keep_last": 9}
    launch(train, (recipe(run, token_shards, training__steps=2, **options),), 2, tmp_path / "log")
    first = whole_state(StoredState(run / "checkpoints" / "step_00000002"), "weight")["layers.0.attention.out.bias"]
    nudge(run / "checkpoints" / "step_00000002", 1e-6)
    values = recipe(run, token_shards, training__steps=4, **options)
    output = launch(train, (values,), 2, tmp_path / "log-on")
    assert re.search(r"warning: .*step_00000002: weight of layers\.0\.attention\.out\.bias differs .* rounding", output)
    export(run / "checkpoints" / "step_00000002", tmp_path / "model")
    assert torch.equal(read_model(tmp_path / "model").state["layers.0.attention.out.bias"], first)
    nudge(run / "checkpoints" / "step_00000004", 0.01)
    longer = recipe(run, token_shards, training__steps=6, **options)
    group = start(train_with, (longer, Changes()), 2, tmp_path / "log-refused")
    assert group.wait() == [2, 2], group.output()
    (error,) = error_lines(group.output())
    assert "layers.0.attention.out.bias differs between tensor-parallel ranks" in error
    with pytest.raises(UserError, match=r"out\.bias differs between tensor-parallel ranks"):
        export(run, tmp_path / "other")


def train_with_a_drift(values: Recipe) -> None:
    """After step 5 the second tensor-parallel rank's copy of a bias is another one; copies are compared at 4 and 8."""
    from digit_ds.parallel import launch as place
    from digit_ds.training import loop, replicas

    replicas.EVERY, replicas.PIECE = 4, 7
    save = loop._Run._exchange

    def exchange(self, *arguments):
        if self.progress.step == 5 and place.rank() == 1:
            for fragment in self.engine.fragments():
                if fragment.name == "layers.0.attention.out.bias":
                    fragment.tensors["weight"].detach().add_(1e-6)
        return save(self, *arguments)

    loop._Run._exchange = exchange
    train(values)


@pytest.mark.parametrize("stage", [1, 3])
def test_copies_that_drift_apart_are_brought_together_from_rank_0(stage, token_shards, tmp_path):
    options = {
        "parallel__tensor": 2,
        "deepspeed": small_messages(tmp_path, f"zero{stage}.json"),
        "checkpoint__every": 6,
    }
    values = recipe(tmp_path / "run", token_shards, training__steps=12, checkpoint__keep_last=9, **options)
    output = launch(train_with_a_drift, (values,), 2, tmp_path / "log")
    warnings = re.findall(r"warning: (step \d+: copies[^\r\n]*)", output)
    assert len(warnings) == 1 and warnings[0].startswith("step 9: copies of parameters differed")
    key = "weight/layers.0.attention.out.bias"
    for step, equal in ((6, False), (12, True)):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        first, second = (load_file(folder / f"tensor-{rank}.data-0.safetensors")[key] for rank in range(2))
        assert torch.equal(first, second) == equal


# --- explicit changes --------------------------------------------------------------------------------------------


def train_by_command(path: Path, options: list[str], bad_steps: tuple[int, ...]) -> None:
    """``digit-ds train``; the gradient is NaN in some steps while the learning rate is what it was."""
    from digit_ds.cli import main
    from digit_ds.training.engine import Engine

    backward, step, calls = Engine.backward, Engine.step, {"micro": 0}

    def broken(self, loss):
        number = 1 + calls["micro"] // 4
        calls["micro"] += 1
        backward(self, loss * float("nan") if number in bad_steps else loss)

    Engine.backward, Engine.step = broken, step
    main(["train", str(path), *options])


def test_the_advice_after_divergence_works_as_printed(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__max_skipped=2, checkpoint__every=2, training__steps=6)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values.model_dump(mode="json")))
    group = start(train_by_command, (path, [], (3, 4)), 1, tmp_path / "log")
    assert group.wait() == [2], group.output()
    (error,) = error_lines(group.output())
    advice = re.findall(r"--change (\S+)=VALUE|--(skip-batches) N", error)
    assert [one or other for one, other in advice] == [
        "optimizer.learning_rate",
        "schedule.warmup_steps",
        "skip-batches",
    ]
    options = ["--change", f"{advice[0][0]}=0.001", "--change", f"{advice[1][0]}=5", f"--{advice[2][1]}", "2"]
    group = start(train_by_command, (path, options, ()), 1, tmp_path / "log-on")
    assert group.wait() == [0], group.output()
    changes = {
        line["key"]: (line["old"], line["new"]) for line in history(tmp_path / "run") if line["event"] == "change"
    }
    assert changes == {"optimizer.learning_rate": (0.02, 0.001), "schedule.warmup_steps": (4, 5)}
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["lr"] == pytest.approx(0.001)
    group = start(train_by_command, (path, [], ()), 1, tmp_path / "log-forgotten")
    assert group.wait() == [2]
    assert "continue with --change optimizer.learning_rate=0.02 to accept the change" in group.output()
    group = start(train_by_command, (path, ["--change", "model.width=32"], ()), 1, tmp_path / "log-width")
    assert group.wait() == [2] and "model.width is 16 there and 32 here" in group.output()


def rewrite_manifest(shards: Path, **values) -> None:
    manifest = read_manifest(shards)
    replace(manifest, **{"provenance": manifest.provenance | values.pop("provenance", {}), **values}).write(shards)


@pytest.mark.fault(
    "shards of another codebook, VQGAN or classes on resume",
    stage="training",
    outcome="refused with one line that names both",
    status="2",
    lost="nothing",
)
def test_a_run_goes_on_with_the_tokens_that_it_was_begun_with(token_shards, tmp_path):
    run = tmp_path / "run"
    launch(train, (recipe(run, token_shards, training__steps=2),), 1, tmp_path / "log")
    moved = shutil.copytree(token_shards, tmp_path / "moved")
    launch(train, (recipe(run, moved, training__steps=3),), 1, tmp_path / "log-moved")

    more = write_shards(tmp_path / "more", images=60)
    longer = recipe(run, more, training__steps=4)
    group = start(train_with, (longer, Changes()), 2, tmp_path / "log-more")
    assert group.wait() == [2, 2]
    (error,) = error_lines(group.output())
    assert f"to accept them, continue with --change data.shards={more}" in error
    group = start(train_with, (longer, Changes(("data.shards",))), 1, tmp_path / "log-said")
    assert group.wait() == [0], group.output()
    assert {line["key"] for line in history(run) if line["event"] == "change"} >= {"data.shards", "training.steps"}

    rewrite_manifest(more, provenance={"codebook_sha256": "other"})
    again = recipe(run, more, training__steps=5)
    group = start(train_with, (again, Changes(("data.shards",))), 1, tmp_path / "log-codebook")
    assert group.wait() == [2]
    (error,) = error_lines(group.output())
    assert "other" in error and str(more) in error and "codebook" in error
    rewrite_manifest(more, provenance={"codebook_sha256": "k"}, classes=["class1", "class0", "class2"])
    group = start(train_with, (again, Changes(("data.shards",))), 1, tmp_path / "log-classes")
    assert group.wait() == [2] and "class" in error_lines(group.output())[0]


# --- start_from --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "bf16")])
def test_masters_are_exactly_the_float32_weights_that_a_run_starts_from(stage, precision, token_shards, tmp_path):
    """Also in bf16; the source is read once, its hash and provenance are carried."""
    from test_training_start import SPEC

    from digit_ds.model.weights import initial_state

    given = initial_state(SPEC, seed=7)
    save_model(tmp_path / "model", SPEC, given, {"codebook_sha256": "k", "steps": 5})
    content = sha256(tmp_path / "model" / "model.safetensors")
    options = {
        "training__start_from": str(tmp_path / "model"),
        "training__precision": precision,
        "training__ema_decay": 0.5,
        "deepspeed": small_messages(tmp_path, f"zero{stage}.json"),
        "optimizer__learning_rate": 1e-30,
        "optimizer__weight_decay": 0.0,
        "schedule__warmup_start": 0.0,
    }
    run = tmp_path / "run"
    launch(train, (recipe(run, token_shards, training__steps=1, **options),), 2, tmp_path / "log")
    for average in (False, True):
        export(run, tmp_path / f"exported-{average}", ema=average)
        _, state, provenance = read_model(tmp_path / f"exported-{average}")
        assert all((state[name] - value).abs().max() < 1e-25 for name, value in given.items())
    assert provenance["start_from"]["sha256"] == content
    assert provenance["start_from"]["provenance"] == {"codebook_sha256": "k", "steps": 5}
    shutil.rmtree(tmp_path / "model")
    launch(train, (recipe(run, token_shards, training__steps=2, **options),), 2, tmp_path / "log-on")
    assert StoredState(newest_checkpoint(run / "checkpoints")).manifest["provenance"]["start_from"]["sha256"] == content

    save_model(tmp_path / "model", SPEC, given, {"codebook_sha256": "another"})
    group = start(train_with, (recipe(tmp_path / "new", token_shards, **options), Changes()), 2, tmp_path / "log-other")
    assert group.wait() == [2, 2]
    (error,) = error_lines(group.output())
    assert "another" in error and "codebook" in error


def test_files_are_readable_as_the_umask_says(token_shards, tmp_path):
    before = os.umask(0o022)
    try:
        launch(train, (recipe(tmp_path / "run", token_shards, training__steps=1),), 1, tmp_path / "log")
        export(tmp_path / "run", tmp_path / "model")
    finally:
        os.umask(before)
    files = [*(tmp_path / "run" / "checkpoints").rglob("*.*"), *(tmp_path / "model").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files if path.is_file()} == {0o644}
