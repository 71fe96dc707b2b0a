"""Pictures of a model in training: what is logged, that the run is the same with and without, and when they fail."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from calls import evaluate, export, sample
from PIL import Image
from training_parts import VQ_CODES, launch, recipe, start, write_shards

from digit_ds.config import Recipe, load_recipe
from digit_ds.data.feature_network import save_feature_network
from digit_ds.errors import UserError
from digit_ds.files import sha256, write_atomically
from digit_ds.tokenizer.vqgan import VqganNetwork

SAMPLES = 24


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    """Token shards, a VQGAN of their codes, a random feature network and pictures to compare with."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    ddconfig = {"z_channels": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
    torch.save({"state_dict": VqganNetwork(ddconfig, VQ_CODES).state_dict()}, root / "vqgan.ckpt")
    config = {"embed_dim": 8, "n_embed": VQ_CODES, "ddconfig": ddconfig}
    (root / "vqgan.yaml").write_text(yaml.safe_dump(config))
    layers = [torch.randn(12, 16), torch.randn(6, 12)]
    save_feature_network(root / "network.safetensors", layers, [torch.randn(12), torch.randn(6)], side=4)
    (root / "reference").mkdir()
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(root / "reference" / f"{number:02d}.png")
    write_shards(root / "shards")
    return {path.name: path for path in root.iterdir()}


def run_recipe(parts: dict[str, Path], run: Path, **preview) -> Recipe:
    return recipe(
        run, parts["shards"], model__kind="vq", model__dropout=0.1, training__steps=9, training__class_dropout=0.2,
        training__ema_decay=0.5, checkpoint={"every": 3, "keep_last": 1}, preview=preview,
    )  # fmt: skip


def train_as_the_command_does(values: Recipe) -> None:
    from digit_ds.cli import _preview
    from digit_ds.training.loop import train

    train(values, *_preview(values))


def train_with_failing_previews(values: Recipe) -> None:
    from digit_ds.training.loop import train

    def fail(what: str, model: Path):  # cannot be pickled to another process: rank 0 calls it between two steps
        raise RuntimeError(f"{what} of {model.name}\ncannot be drawn")

    train(values, None, partial(fail, "figures"))


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_online_fid_is_evaluates_and_changes_nothing_of_the_run(parts, tmp_path):
    painter = {"vqgan": str(parts["vqgan.ckpt"]), "vqgan_config": str(parts["vqgan.yaml"])}
    scores = {"fid_reference": str(parts["reference"]), "fid_features": str(parts["network.safetensors"])}
    watched = run_recipe(parts, tmp_path / "watched", **painter, **scores, fid_samples=SAMPLES, top_k=4)
    launch(train_as_the_command_does, (watched,), 2, tmp_path / "watched_log")
    launch(train_as_the_command_does, (run_recipe(parts, tmp_path / "plain"),), 2, tmp_path / "plain_log")
    said = launch(train_with_failing_previews, (run_recipe(parts, tmp_path / "fails"),), 2, tmp_path / "fails_log")

    figures = {
        line["step"]: line[f"online_fid_{SAMPLES}"] for line in lines(tmp_path / "watched") if "loss" not in line
    }
    assert list(figures) == [3, 6, 9]
    export(tmp_path / "watched", tmp_path / "model", ema=True)
    sample(tmp_path / "drawn", **painter, prior=tmp_path / "model", count=SAMPLES, batch=SAMPLES, precision="float32",
           top_k=4)  # fmt: skip
    images, out = tmp_path / "drawn" / "images", tmp_path / "scores.json"
    expected = evaluate(images, parts["reference"], out, features=parts["network.safetensors"])["fid"]
    assert figures[9] == pytest.approx(expected, rel=1e-6)
    assert len(set(figures.values())) == 3, "the model learns, so its pictures change"
    assert not (tmp_path / "watched" / ".preview").exists()
    for run in ("watched", "fails"):  # what waited for its preview is removed at the end
        assert [path.name for path in (tmp_path / run / "checkpoints").glob("step_*")] == ["step_00000009"]

    assert said.count("previews cannot be drawn beside training (") == 1
    for step in (3, 6, 9):
        assert (
            f"no preview of the checkpoint of step {step} (RuntimeError: figures of .preview cannot be drawn)" in said
        )
    final = "checkpoints/step_00000009"
    for other in ("watched", "fails"):
        for part in ("tensor-0.data-0.safetensors", "tensor-0.data-1.safetensors"):
            assert sha256(tmp_path / other / final / part) == sha256(tmp_path / "plain" / final / part)
        ours, plain = ([line for line in lines(tmp_path / run) if "loss" in line] for run in (other, "plain"))
        assert [(line["loss"], line["sample_ids_hash"]) for line in ours] == [
            (line["loss"], line["sample_ids_hash"]) for line in plain
        ]


def held_up(folder: Path, model: Path) -> dict[str, float]:
    """The first preview ends when rank 1 has done steps meanwhile, the second is killed, the third hangs."""
    number = 1 + len(list(folder.glob("drawing-*")))
    (folder / f"drawing-{number}").write_text(f"{os.getpid()}")
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(6000):
        if number == 1 and (folder / "steps").exists():
            return {"steps_meanwhile": float((folder / "steps").read_text())}
        time.sleep(0.01)
    raise AssertionError("no step was done meanwhile")


def train_beside_previews(values: Recipe, folder: Path) -> None:
    from digit_ds.parallel import launch as place
    from digit_ds.training import loop

    step, seen = loop._Run._step, []

    def watched(self, *arguments):
        done = self.progress.step
        if place.rank() == 1 and (folder / "drawing-1").exists():
            seen.append(done)
            if len(seen) == 8:
                write_atomically(folder / "steps", lambda path: path.write_text(f"{done - seen[0]}"))
            if (folder / "drawing-3").exists() and not (folder / "stopped").exists():
                (folder / "stopped").touch()
                os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *arguments)

    loop._Run._step = watched
    loop.train(values, None, partial(held_up, folder))


@pytest.mark.fault(
    "the process that draws previews dies, or a signal comes while it draws",
    stage="training",
    outcome="a warning that names the checkpoint; training goes on, or ends as without previews",
    status="-, 75 after the signal",
    lost="that preview",
)
def test_ranks_go_on_while_a_preview_is_drawn_and_do_not_need_it(parts, tmp_path):
    values = recipe(tmp_path / "run", parts["shards"], training__steps=100_000, checkpoint__every=50)
    group = start(train_beside_previews, (values, tmp_path), 2, tmp_path / "log")
    try:
        assert group.wait() == [75, 75], group.output()[-3000:]
    finally:
        group.kill()
    (place, preview) = next((n, line) for n, line in enumerate(lines(tmp_path / "run")) if "steps_meanwhile" in line)
    assert preview["step"] == 50 and preview["steps_meanwhile"] == 7
    assert lines(tmp_path / "run")[place - 1]["step"] >= 57, "logged later, at its own step"
    said = group.output()
    assert said.count("(the process that draws has ended, perhaps for want of memory)") == 1
    assert "no preview of the checkpoint of step" in said and "(the run has ended)" in said
    assert not psutil.pid_exists(int((tmp_path / "drawing-3").read_text()))
    assert not (tmp_path / "run" / ".preview").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["preview.fid_samples=100"], "preview.vqgan is not set"),
        (["preview.fid_samples=100", "preview.vqgan=v"], "preview.fid_reference is not set"),
        (["preview.fid_samples=100", "preview.vqgan=v", "preview.fid_reference=r"], "expected either preview.fid_inc"),
        (["preview.fid_samples=1"], "expected at least 2"),
    ],
)
def test_what_an_fid_needs_is_asked_for(tmp_path, changes, message):
    (tmp_path / "r.yaml").write_text("run: r\ndata: {shards: s}\ntraining: {steps: 1}\n")
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "r.yaml", changes)
