"""The stream on which DeepSpeed gathers weights under ZeRO 3 waits for what changes their parts.

A CPU has no streams, so that the order is looked at here: when the stream is told to wait, the parts are already
new. On two GPUs tests/gpu/test_training_two_gpus.py compares losses while updates are slow.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from training_parts import launch, recipe, train, write_shards


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
