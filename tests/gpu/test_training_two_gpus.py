"""Training over NCCL on two GPUs: layouts, signals and killed ranks, as in tests/ over gloo."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ports import free_ports
from training_parts import (
    MODERN,
    launch,
    metrics,
    recipe,
    small_messages,
    start,
    steps_logged,
    train,
    train_all,
    write_shards,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

WIDTH = 128
SIZES = {"model__width": WIDTH, "optimizer__learning_rate": 2e-3}
FLOAT32 = {
    "2x1-zero1": (2, "zero1"),
    "1x2-zero2": (1, "zero2"),
    "2x1-zero3": (2, "zero3"),
    "1x2-zero3": (1, "zero3"),
    "modern-2x1-zero1": (2, "zero1"),
    "modern-2x1-zero3": (2, "zero3"),
}
"""Tensor size x data size, DeepSpeed file; published layers or modern ones."""
BFLOAT16 = {"2x1-zero1": (2, "zero1", False), "1x2-zero1": (1, "zero1", True), "1x2-zero2": (1, "zero2", True)}
"""The same, and whether the layers are compiled."""
FAST = {
    "2x1-zero1": (2, "zero1", False),
    "2x1-zero1-sequence": (2, "zero1", True),
    "1x2-zero2_overlap": (1, "zero2_overlap", False),
    "1x2-zero3_overlap": (1, "zero3_overlap", False),
    "2x1-zero3_overlap-sequence": (2, "zero3_overlap", True),
}
"""Compiled layers in float32: tensor size, DeepSpeed file, sequence parallelism."""


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train_all_with_a_slow_device(recipes: list, ports: list[int]) -> None:
    """As ``train_all``; the GPU is behind the host whenever it has gradients to compute or weights to update.

    What another stream reads too early is then what it was before, in models of any size.
    """
    from digit_ds.training.engine import Engine
    from digit_ds.training.optimizer import GuardedAdamW

    def late(method, milliseconds: int):
        def run(self, *arguments):
            torch.cuda._sleep(milliseconds * 2_000_000)  # clock cycles
            return method(self, *arguments)

        return run

    Engine.backward, GuardedAdamW.step = late(Engine.backward, 10), late(GuardedAdamW.step, 100)
    train_all(recipes, ports)


@pytest.fixture(scope="module")
def runs(token_shards, tmp_path_factory) -> dict[str, list[dict]]:
    """Metrics of 20 steps at every layout, and of one GPU alone."""
    folder = tmp_path_factory.mktemp("runs")
    single = {"alone": {}, "modern-alone": MODERN}
    alone = [
        recipe(folder / name, token_shards, deepspeed="zero0.json", **SIZES, **options)
        for name, options in single.items()
    ]
    launch(train_all, (alone, free_ports(len(alone))), 1, folder / "log-alone", timeout=300)
    recipes = {
        f"fp32-{name}": {"deepspeed": small_messages(folder, f"{file}.json", WIDTH), "parallel__tensor": tensor}
        | (MODERN if name.startswith("modern") else {})
        for name, (tensor, file) in FLOAT32.items()
    } | {
        f"bf16-{name}": {
            "deepspeed": small_messages(folder, f"{file}.json", WIDTH),
            "parallel__tensor": tensor,
            "training__precision": "bf16",
            "training__compile": compiled,
        }
        for name, (tensor, file, compiled) in BFLOAT16.items()
    }
    recipes |= {
        f"fast-{name}": {
            "deepspeed": small_messages(folder, f"{file}.json", WIDTH),
            "parallel__tensor": tensor,
            "parallel__sequence": sequence,
            "training__compile": True,
        }
        for name, (tensor, file, sequence) in FAST.items()
    }
    # What is compiled, in processes of its own: it failed once in one that had trained other layouts uncompiled before.
    # Nobody trains so; the cause is not known.
    for compiled in (False, True):
        values = [
            recipe(folder / name, token_shards, **SIZES, **options)
            for name, options in recipes.items()
            if options.get("training__compile", False) == compiled
        ]
        arguments = values, free_ports(len(values))
        launch(train_all_with_a_slow_device, arguments, 2, folder / f"log-{compiled}", timeout=500)
    return {name: metrics(folder / name) for name in (*single, *recipes)}


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_layouts_agree(name, runs):
    """NCCL adds in another order than one GPU: ten times the tolerance of the CPUs' 1e-5."""
    alone = runs["modern-alone" if name.startswith("modern") else "alone"]
    for line, expected in zip(runs[f"fp32-{name}"], alone, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4), line["step"]
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), line["step"]
        assert line["sample_ids_hash"] == expected["sample_ids_hash"]
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.3


@pytest.mark.parametrize("name", FAST)
def test_compiled_float32_layouts_agree(name, runs):
    for line, expected in zip(runs[f"fast-{name}"], runs["alone"], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4), line["step"]
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), line["step"]


@pytest.mark.parametrize("name", BFLOAT16)
def test_bf16_layouts_follow_float32(name, runs):
    found = [line["loss"] for line in runs[f"bf16-{name}"]]
    assert found == pytest.approx([line["loss"] for line in runs["alone"]], rel=0.02)


@pytest.mark.parametrize("how", [signal.SIGUSR1, signal.SIGKILL, signal.SIGSTOP], ids=["USR1", "KILL", "STOP"])
def test_a_signal_to_one_rank(how, token_shards, tmp_path):
    """USR1: both save the same step and leave with 75. Killed or stopped permanently: the other exits by itself."""
    # Long enough for one rank to wait for the other's compiler.
    values = recipe(tmp_path / "run", token_shards, training__steps=100_000, training__timeout_seconds=40.0, **SIZES)
    group = start(train, (values,), 2, tmp_path / "log")
    try:
        end = time.monotonic() + 150
        while steps_logged(tmp_path / "run") < 4:
            assert time.monotonic() < end, group.output()[-3000:]
            time.sleep(0.05)
        os.kill(group.processes[1].pid, how)
        group.processes[0].join(90)
        status = group.processes[0].exitcode
        if how == signal.SIGUSR1:
            assert group.wait(60) == [75, 75], group.output()[-3000:]
            assert group.output().count("stopped by signal at step") == 2
        else:
            assert status not in (None, 0), group.output()[-3000:]
    finally:
        group.kill()
