"""Tensor beside data parallelism on four and eight GPUs: equal losses, and signals and deaths of one rank of all.

Over gloo without a GPU: see tests/devices.py.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from devices import needs
from ports import free_ports
from training_parts import launch, metrics, recipe, small_messages, start, steps_logged, train, train_all, write_shards

from digit_ds.training.stored import newest_checkpoint

pytestmark = pytest.mark.gpu

LAYOUTS = {"2x2": (2, 2), "4x2": (4, 2), "2x4": (2, 4)}
"""Tensor size, data size."""
FILES = {False: ("zero1", "zero2", "zero3"), True: ("zero1", "zero2_overlap", "zero3_overlap")}
"""DeepSpeed configurations of uncompiled and compiled layers."""
OPTIONS = {
    "model__width": 128,
    "optimizer__learning_rate": 2e-3,
    "training__global_batch": 16,
    "training__micro_batch": 4,
}
GROUPS = [
    pytest.param(layout, precision, compiled, id=f"{layout}-{precision}{'-compiled' * compiled}", marks=needs(t * d))
    for (layout, (t, d)), precision, compiled in product(LAYOUTS.items(), ("fp32", "bf16"), (False, True))
]


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def alone(token_shards, tmp_path_factory) -> Callable[[str], list[dict]]:
    """Metrics of one device alone, computed once for each precision."""
    known = {}

    def of(precision: str) -> list[dict]:
        if precision not in known:
            folder = tmp_path_factory.mktemp(f"alone-{precision}")
            values = recipe(folder / "run", token_shards, training__precision=precision, **OPTIONS)
            launch(train, (values,), 1, folder / "log")
            known[precision] = metrics(folder / "run")
            assert known[precision][-1]["loss"] < known[precision][0]["loss"] - 0.3
        return known[precision]

    return of


@pytest.mark.parametrize(("layout", "precision", "compiled"), GROUPS)
def test_layouts_agree_with_one_device(layout, precision, compiled, token_shards, alone, tmp_path):
    """ZeRO 1 to 3, with sequence parallelism and without, one after the other in the same processes."""
    tensor, data = LAYOUTS[layout]
    recipes = [
        recipe(
            tmp_path / f"{file}{'-sequence' * sequence}",
            token_shards,
            deepspeed=small_messages(tmp_path, f"{file}.json", OPTIONS["model__width"]),
            parallel__tensor=tensor,
            parallel__sequence=sequence,
            training__precision=precision,
            training__compile=compiled,
            **OPTIONS,
        )
        for file, sequence in product(FILES[compiled], (False, True))
    ]
    launch(train_all, (recipes, free_ports(len(recipes))), tensor * data, tmp_path / "log", timeout=560)
    expected = alone(precision)
    loss_tolerance, norm_tolerance = (1e-4, 1e-3) if precision == "fp32" else (2e-3, 0.05)
    for values in recipes:
        for line, other in zip(metrics(Path(values.run)), expected, strict=True):
            where = values.run, line["step"]
            assert line["loss"] == pytest.approx(other["loss"], rel=loss_tolerance), where
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=norm_tolerance), where
            assert line["sample_ids_hash"] == other["sample_ids_hash"], where


STEPS = 60
RESHAPED = [
    pytest.param((2, 2, "zero1"), (1, 4, "zero3"), id="2x2-zero1-to-1x4-zero3", marks=needs(4)),
    pytest.param((2, 4, "zero2"), (4, 2, "zero3"), id="2x4-zero2-to-4x2-zero3", marks=needs(8)),
]


@pytest.fixture(scope="module")
def straight(token_shards, tmp_path_factory) -> list[dict]:
    """Metrics of one device that nobody interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    launch(train, (recipe(folder / "run", token_shards, training__steps=STEPS, **OPTIONS),), 1, folder / "log")
    return metrics(folder / "run")


@pytest.mark.parametrize(("before", "after"), RESHAPED)
@pytest.mark.parametrize("how", [signal.SIGUSR1, signal.SIGKILL, signal.SIGSTOP], ids=["USR1", "KILL", "STOP"])
def test_signal_to_one_rank_then_another_layout(how, before, after, token_shards, straight, tmp_path):
    """USR1: all save the same step and leave with 75. Killed or stopped permanently: the others exit by themselves.
    The run then continues at another layout, from that step or from the newest checkpoint, with equal results.
    """
    run = tmp_path / "run"

    def at(layout: tuple[int, int, str], steps: int):
        tensor, _, file = layout
        options = OPTIONS | {"training__steps": steps, "checkpoint__every": 5, "training__timeout_seconds": 40.0}
        return recipe(run, token_shards, parallel__tensor=tensor, deepspeed=f"{file}.json", **options)

    world = before[0] * before[1]
    group = start(train, (at(before, 100_000),), world, tmp_path / "log")
    victim = group.processes[world - 3]
    others = [process for process in group.processes if process is not victim]
    try:
        end = time.monotonic() + 200
        while steps_logged(run) < 7:
            assert time.monotonic() < end, group.output()[-3000:]
            time.sleep(0.02)
        os.kill(victim.pid, how)
        end = time.monotonic() + 120
        for process in others:
            process.join(max(0.0, end - time.monotonic()))
        statuses = [process.exitcode for process in others]
        if how == signal.SIGUSR1:
            assert group.wait(60) == [75] * world, group.output()[-3000:]
            assert group.output().count(f"stopped by signal at step {steps_logged(run)}") == world
        else:
            assert all(status not in (None, 0) for status in statuses), (statuses, group.output()[-3000:])
    finally:
        group.kill()
    saved = int(newest_checkpoint(run / "checkpoints").name.removeprefix("step_"))
    assert saved == steps_logged(run) if how == signal.SIGUSR1 else 5 <= saved <= steps_logged(run) < STEPS
    output = launch(train, (at(after, STEPS),), after[0] * after[1], tmp_path / "log-after")
    assert f"from step {saved} of {STEPS}" in output
    for line, expected in zip(metrics(run), straight, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4), line["step"]
        assert line["sample_ids_hash"] == expected["sample_ids_hash"]
