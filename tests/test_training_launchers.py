"""The same recipe alone, under torchrun and under the deepspeed launcher, and the options that must not change it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from calls import export
from ports import free_port
from small_models import random_ids
from training_parts import launch, metrics, recipe, train, write_shards

from digit_ds.errors import UserError
from digit_ds.model.transformer import load_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
CURVE = Path(__file__).parent / "golden" / "training" / "loss_curve.json"


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def alone(token_shards, tmp_path_factory) -> Path:
    """Run directory of one process: dropout, class dropout and a moving average on."""
    folder = tmp_path_factory.mktemp("alone")
    launch(train, (with_everything(folder / "run", token_shards),), 1, folder / "log")
    return folder / "run"


def with_everything(run: Path, token_shards: Path, **overrides):
    options = {"model__dropout": 0.1, "training__class_dropout": 0.3, "training__ema_decay": 0.8}
    # The order of version 0.2, with which the curve was made.
    return recipe(run, token_shards, data__order="permutation", **options, **overrides)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launcher_gives_the_losses_of_one_process(launcher, token_shards, alone, tmp_path):
    values = with_everything(tmp_path / "run", token_shards, parallel__tensor=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values.model_dump(mode="json")))
    port = str(free_port())
    command = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m"],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "--module"],
    }[launcher]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = "1"
    finished = subprocess.run(
        [sys.executable, "-m", *command, "digit_ds", "train", str(path)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=500, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    for line, expected in zip(metrics(tmp_path / "run"), metrics(alone), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["sample_ids_hash"] == expected["sample_ids_hash"]


def test_loss_curve_is_the_committed_one(alone):
    """Anything that changes what is computed shows here; a change on purpose commits a new curve."""
    expected = json.loads(CURVE.read_text())
    found = [line["loss"] for line in metrics(alone)]
    assert found == pytest.approx(expected["loss"], rel=expected["relative_tolerance"])


def test_recomputation_changes_nothing(token_shards, alone, tmp_path):
    launch(train, (with_everything(tmp_path / "run", token_shards, training__recompute=True),), 1, tmp_path / "log")
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(
        [line["loss"] for line in metrics(alone)], rel=1e-6
    )


def test_class_dropout_changes_the_losses(token_shards, alone, tmp_path):
    values = with_everything(tmp_path / "run", token_shards).model_dump()
    values["training"]["class_dropout"] = 0.0
    launch(train, (type(recipe(tmp_path, token_shards)).model_validate(values),), 1, tmp_path / "log")
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(alone)[0]["loss"]


def test_export_of_weights_and_average(alone, tmp_path):
    export(alone, tmp_path / "model")
    export(alone / "checkpoints" / "step_00000020", tmp_path / "average", ema=True)
    model, average = load_model(tmp_path / "model"), load_model(tmp_path / "average")
    assert model.spec == average.spec and model.spec.classes == 3
    assert model(random_ids(model.spec, 2)).shape == (2, 17, 32)
    assert not torch.equal(model.output.weight, average.output.weight)
    torch.testing.assert_close(model.output.weight, average.output.weight, rtol=0, atol=0.1)
    with pytest.raises(UserError, match=r"no_such_run: is not a directory, expected a run directory or one checkpoint"):
        export(tmp_path / "no_such_run", tmp_path / "none")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["provenance"]["codebook_sha256"] == "k" and config["provenance"]["steps"] == 20
