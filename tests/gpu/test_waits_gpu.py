"""The host never waits for the GPU in the middle of a step: what it does next would begin too late."""

import json
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ports import free_ports
from training_parts import MODERN, launch, recipe, train, write_shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WATCHED = range(5, 10)
"""Steps that log, but neither save nor compile nor begin the run."""
CASES = {
    "zero1": {"deepspeed": "zero1.json"},
    "zero2_overlap": {"deepspeed": "zero2_overlap.json"},
    "zero3_overlap": {"deepspeed": "zero3_overlap.json"},
    "modern-classes": {"deepspeed": "zero1.json", "training__ema_decay": 0.9} | MODERN,
    "nar": {"deepspeed": "zero2_overlap.json", "model__kind": "nar", "model__norm_position": "pre"},
    "random-order": {"training__order": "random", "training__order_anneal": (5, 15)},
}


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train_noting_waits(cases: list, ports: list[int], out: Path) -> None:
    """Trainings one after the other; what PyTorch calls a wait of the host for the device, and explicit waits."""
    from digit_ds.training.loop import _Run

    original, synchronize, found, watched = _Run._step, torch.cuda.synchronize, [], [False]

    def step(self, *arguments):
        watched[0] = self.progress.step in WATCHED
        torch.cuda.set_sync_debug_mode("warn" if watched[0] else "default")
        return original(self, *arguments)

    def note() -> None:
        if watched[0] and threading.current_thread() is threading.main_thread():
            found.append("".join(traceback.format_stack(limit=14)[:-2]))

    def warned(message, *_) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            note()

    def waits(*arguments) -> None:
        note()
        synchronize(*arguments)

    _Run._step, torch.cuda.synchronize, warnings.showwarning = step, waits, warned
    warnings.simplefilter("always")
    known = {}
    for (name, values), port in zip(cases, ports, strict=True):
        found.clear()
        os.environ["MASTER_PORT"] = str(port)
        train(values)
        torch.cuda.set_sync_debug_mode("default")
        known[name] = sorted(set(found))
    out.write_text(json.dumps(known))


def test_no_step_waits_for_the_gpu(token_shards, tmp_path):
    common = {"training__steps": 12, "monitor__log_every": 2, "training__precision": "bf16"}
    common |= {"model__dropout": 0.1, "training__compile": True}
    cases = [(name, recipe(tmp_path / name, token_shards, **common, **options)) for name, options in CASES.items()]
    launch(train_noting_waits, (cases, free_ports(len(cases)), tmp_path / "out"), 1, tmp_path / "log", timeout=400)
    found = json.loads((tmp_path / "out").read_text())
    assert not any(found.values()), "\n".join(f"{name}:\n{wait}" for name, waits in found.items() for wait in waits)
