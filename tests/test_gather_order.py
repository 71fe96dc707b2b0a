"""The stream on which DeepSpeed gathers weights under ZeRO 3 waits for what changes their parts.

A CPU has no streams, so that the order is looked at here: when the stream is told to wait, the parts are already
new. On two GPUs tests/gpu/test_training_two_gpus.py compares losses while updates are slow.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from training_parts import launch, recipe, small_messages, train, write_shards


class Stream:
    """In the place of a GPU's stream: the parts when it is told to wait."""

    def __init__(self, parameters: list) -> None:
        self._parameters, self.found = parameters, []

    def wait_stream(self, other: object) -> None:
        self.found.append([parameter.ds_tensor.detach().clone() for parameter in self._parameters])

    def take(self) -> list[torch.Tensor] | None:
        """The parts at the last wait since the last call, if there was one."""
        found, self.found = self.found, []
        return found[-1] if found else None


def train_watching(values, out: Path) -> None:
    """After each update, and after weights are set from outside: did the stream wait, with the new parts?"""
    from digit_ds.training.engine import Engine

    step, notes = Engine.step, []

    def note(engine: Engine, before: list[torch.Tensor]) -> None:
        now = [parameter.ds_tensor.detach().clone() for parameter in engine.model.parameters()]
        waited = stream_of(engine).take()
        current = waited is not None and all(map(torch.equal, waited, now))
        notes.append({"changed": not all(map(torch.equal, before, now)), "current": current})

    def stream_of(engine: Engine) -> Stream:
        owner, name = engine._deepspeed.optimizer.parameter_offload, "_DeepSpeedZeRoOffload__allgather_stream"
        if getattr(owner, name) is None:
            setattr(owner, name, Stream(list(engine.model.parameters())))
        return getattr(owner, name)

    def watch(self: Engine, rate: float) -> None:
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        before = [parameter.ds_tensor.detach().clone() for parameter in self.model.parameters()]
        stream_of(self)
        step(self, rate)
        if boundary:
            note(self, before)
        if len(notes) == values.training.steps:
            before = [parameter.ds_tensor.detach().clone() for parameter in self.model.parameters()]
            for fragment in self.fragments():
                fragment.tensors["weight"].detach().add_(1)
            self.refresh_model()
            note(self, before)

    Engine.step = watch
    train(values)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(notes))


@pytest.mark.parametrize("deepspeed", ["zero3.json", "zero3_overlap.json", "zero3_offload.json"])
def test_gathers_wait_for_the_update(deepspeed, tmp_path):
    shards = write_shards(tmp_path / "shards")
    training = {"training__steps": 3, "training__precision": "bf16"}
    values = recipe(tmp_path / "run", shards, deepspeed=deepspeed, **training)
    launch(train_watching, (values, tmp_path / "out"), 2, tmp_path / "log")
    notes = json.loads((tmp_path / "out").read_text())
    assert notes == [{"changed": True, "current": True}] * 4


def train_noting_messages(values, out: Path) -> None:
    """How many matrices the first gather after each update joins."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from digit_ds.training.engine import Engine

    name, step, joined = "_PartitionedParameterCoordinator__all_gather_params", Engine.step, []
    gather = getattr(PartitionedParameterCoordinator, name)

    def note(self, parameters, forward: bool) -> None:
        missing = [parameter for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE"]
        if missing and joined and joined[-1] is None:
            joined[-1] = sum(len(parameter.ds_shape) == 2 for parameter in missing)
        gather(self, parameters, forward)

    def update(self: Engine, rate: float) -> None:
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        step(self, rate)
        if boundary:
            joined.append(None)

    setattr(PartitionedParameterCoordinator, name, note)
    Engine.step = update
    train(values)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(joined[:-1]))


@pytest.mark.parametrize("width", [16, 128])
def test_small_messages_join_several_matrices(width, tmp_path):
    """Only then DeepSpeed copies parts before it sends them, and may do so too early.

    With one matrix in each message, the runs that are compared on GPUs would be equal without the wait too.
    """
    values = recipe(
        tmp_path / "run",
        write_shards(tmp_path / "shards"),
        deepspeed=small_messages(tmp_path, "zero3_overlap.json", width),
        model__width=width,
        training__steps=4,
    )
    launch(train_noting_messages, (values, tmp_path / "out"), 2, tmp_path / "log")
    joined = json.loads((tmp_path / "out").read_text())
    assert len(joined) == 3 and min(joined) > 1, joined
