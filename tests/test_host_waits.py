"""What would make the host wait for the GPU in each step; on a GPU tests/gpu/test_waits_gpu.py looks for all of it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from ports import free_ports
from training_parts import launch, recipe, train, write_shards

FILES = ("zero1.json", "zero2_overlap.json", "zero3_overlap.json")


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train_counting(recipes: list, ports: list[int], out: Path) -> None:
    """Trainings one after the other: DeepSpeed's waits and constants on the device, and what it makes of norms."""
    from digit_ds.parallel.frameworks import deepspeed
    from digit_ds.training.engine import Engine

    original = deepspeed.runtime.utils.mask_nan_or_inf_with_val_inplace
    accelerator, counts, step, steps = deepspeed.get_accelerator(), [], Engine.step, []

    def note(self, rate: float) -> None:
        step(self, rate)
        steps.append(len(counts))

    def constant(*arguments, **options) -> torch.Tensor:
        """The host copies it to a device, once the device has done all that was issued before."""
        if options.get("device") is not None and sys._getframe(1).f_globals["__name__"].startswith("deepspeed."):
            counts.append(1)
        return tensor(*arguments, **options)

    tensor, torch.tensor = torch.tensor, constant
    accelerator.synchronize = lambda *_: counts.append(1)
    Engine.step = note
    found = {}
    for values, port in zip(recipes, ports, strict=True):
        counts.clear(), steps.clear()
        os.environ["MASTER_PORT"] = str(port)
        train(values)
        found[Path(values.run).name] = steps[-1] - steps[7]  # from the third step on, without the checkpoint
    norms = torch.tensor([2.5, 0.0, -1.0, float("inf"), -float("inf"), float("nan")])
    ours, theirs = norms.clone(), norms.clone()
    deepspeed.runtime.utils.mask_nan_or_inf_with_val_inplace(ours)
    original(theirs)
    out.write_text(json.dumps({"waits": found, "ours": ours.tolist(), "theirs": theirs.tolist()}))


def test_deepspeed_lets_no_step_wait_for_the_device(token_shards, tmp_path):
    """Its measurement of throughput did, twice in each micro-batch; a replaced function marks the same norms."""
    common = {"training__precision": "bf16", "training__steps": 6, "training__micro_batch": 1}
    recipes = [recipe(tmp_path / name, token_shards, deepspeed=name, **common) for name in FILES]
    launch(train_counting, (recipes, free_ports(len(recipes)), tmp_path / "out"), 1, tmp_path / "log")
    found = json.loads((tmp_path / "out").read_text())
    assert found["waits"] == dict.fromkeys(FILES, 0)
    assert found["ours"] == found["theirs"] == [2.5, 0.0, -1.0, -1.0, -1.0, -1.0]
