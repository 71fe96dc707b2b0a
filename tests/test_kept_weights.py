"""Weights too small for ZeRO 3 to give back: they stay where they are, and hold what the ranks' parts are."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from training_parts import launch, recipe, train, write_shards


def train_watching(values, out: Path) -> None:
    """After each step, of each kept parameter: its address, and whether it is what the ranks' parts make.

    Also how many of them DeepSpeed has freed until then.
    """
    from deepspeed.runtime.zero import partition_parameters

    from digit_ds.training.engine import Engine

    step, free, freed, steps = Engine.step, partition_parameters.free_param, [], []

    def watch(self, rate: float) -> None:
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        step(self, rate)
        if boundary:
            kept = self._deepspeed.optimizer.persistent_parameters
            steps.append({"freed": len(freed), "kept": [look(parameter) for parameter in kept]})

    def look(parameter) -> tuple[int, bool]:
        part = parameter.ds_tensor.detach().clone()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        expected = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
        return parameter.data_ptr(), torch.equal(parameter.detach(), expected)

    def note(parameter) -> None:
        if parameter.ds_persist:
            freed.append(1)
        free(parameter)

    Engine.step, partition_parameters.free_param = watch, note
    train(values)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(steps))


def test_small_weights_stay_in_place_and_follow_the_parts(tmp_path):
    """On three ranks, into which a width of 20 does not divide; 40 bytes are no multiple of 16."""
    shards = write_shards(tmp_path / "shards")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 90, "reduce_bucket_size": 3000}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    model = recipe(tmp_path, shards).model.model_dump() | {"width": 20}
    training = {"training__steps": 5, "training__global_batch": 12, "training__precision": "bf16"}
    values = recipe(tmp_path / "run", shards, deepspeed=str(tmp_path / "zero3.json"), model=model, **training)
    launch(train_watching, (values, tmp_path / "out"), 3, tmp_path / "log")
    steps = json.loads((tmp_path / "out").read_text())
    assert len(steps) == 5 and len(steps[0]["kept"]) > 10
    assert all(same for step in steps for _, same in step["kept"])
    addresses = [[address for address, _ in step["kept"]] for step in steps]
    assert all(step == addresses[0] for step in addresses)
    assert all(address % 16 == 0 for address in addresses[0])  # the widest access of a compiled kernel
    assert {step["freed"] for step in steps} == {steps[0]["freed"]}  # before the first gather they are DeepSpeed's


def gather_beside_offloaded_parts() -> None:
    """Parts on the CPU and another device, of which there is one everywhere that holds no values."""
    from digit_ds.training.kept_weights import KeptWeights

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kept = KeptWeights([torch.ones(6), torch.ones(2)], [(2, 3), (2,)], dist.group.WORLD, torch.device("meta"))
    kept.gather()
    assert [(whole.device.type, whole.shape) for whole in kept.whole] == [("meta", (2, 3)), ("meta", (2,))]
    dist.destroy_process_group()


def test_small_weights_are_on_the_device_where_the_parts_are_offloaded(tmp_path):
    launch(gather_beside_offloaded_parts, (), 1, tmp_path / "log")
