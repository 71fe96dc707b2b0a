"""The own time of a rank on real GPUs: the device's work before the sums over ranks, not the host's, not the rest."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_parts import launch, metrics, recipe, train, write_shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CYCLES = 50_000_000  # some thirty milliseconds of a device that does nothing else
STEPS, EVERY = 30, 5


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def seconds_of(cycles: int) -> float:
    """How long this device needs for so many cycles."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def train_with_slow_device(values, in_loss: list[int], in_backward: list[int]) -> None:
    """The device of rank ``r`` idles ``in_loss[r]`` and ``in_backward[r]`` cycles in every micro-batch."""
    from digit_ds.parallel import launch as place
    from digit_ds.training.engine import Engine

    loss, backward = Engine.loss, Engine.backward

    def slow_loss(self, *arguments):
        torch.cuda._sleep(in_loss[place.rank()])
        return loss(self, *arguments)

    def slow_backward(self, value):
        torch.cuda._sleep(in_backward[place.rank()])
        return backward(self, value)

    Engine.loss, Engine.backward = slow_loss, slow_backward
    train(values)


def test_own_time_is_the_devices_until_the_backward_pass(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=STEPS, monitor__log_every=EVERY)
    launch(train_with_slow_device, (values, [CYCLES], [3 * CYCLES]), 1, tmp_path / "log")
    own = 4 * seconds_of(CYCLES)  # four micro-batches a step
    for line in metrics(tmp_path / "run")[1:]:  # kernels are loaded in the first steps
        assert own * 0.8 < line["rank_seconds_max"] < own * 2 < own * 3 < line["step_seconds"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_slow_device_is_named(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=STEPS, monitor__log_every=EVERY)
    output = launch(train_with_slow_device, (values, [1, 2 * CYCLES], [1, 1]), 2, tmp_path / "log")
    extra = 2 * seconds_of(2 * CYCLES)  # two micro-batches a step
    for line in metrics(tmp_path / "run")[1:]:
        assert line["slowest_rank"] == 1
        assert line["rank_seconds_max"] > line["rank_seconds_median"] + extra / 2
    assert re.findall(r"^warning: (rank \d) \(\S+\) delays the other ranks", output, re.MULTILINE) == ["rank 1"]
