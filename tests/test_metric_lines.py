"""Lines of metrics: no rank waits for one, none is behind a checkpoint or lost, and their times leave nothing out."""

import threading
import time
from pathlib import Path

import pytest
from training_parts import launch, metrics, recipe, start, steps_logged, train, write_shards

from digit_ds.config import Recipe


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train_ahead_of_the_first_line(values: Recipe) -> None:
    """The line of step 1 is completed only once this rank is in the backward pass of step 2."""
    from digit_ds.training.engine import Engine
    from digit_ds.training.pace import Pace

    own, backward, second, calls = Pace.own_nanoseconds, Engine.backward, threading.Event(), {"micro": 0}

    def late_own(self, marks):
        assert second.wait(60), "step 2 does not begin before the line of step 1 is there"
        return own(self, marks)

    def counting(self, loss):
        calls["micro"] += 1
        if calls["micro"] == 3:  # two micro-batches a step
            second.set()
        backward(self, loss)

    Pace.own_nanoseconds, Engine.backward = late_own, counting
    train(values)


def test_ranks_do_not_wait_for_a_line(token_shards, tmp_path):
    straight = recipe(tmp_path / "straight", token_shards, training__steps=4)
    launch(train, (straight,), 1, tmp_path / "log-straight")
    values = recipe(tmp_path / "run", token_shards, training__steps=4)
    launch(train_ahead_of_the_first_line, (values,), 2, tmp_path / "log")
    for line, expected in zip(metrics(tmp_path / "run"), metrics(tmp_path / "straight"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for key in ("step", "images", "lr", "token_usage", "sample_ids_hash"):
            assert line[key] == expected[key], key


def train_with_slow_lines(values: Recipe, seconds: float, bad_steps: tuple[int, ...] = ()) -> None:
    """Numbers for a line arrive late; a checkpoint that is begun before the lines of its steps are there fails."""
    from digit_ds.training.checkpoint import Checkpoints
    from digit_ds.training.engine import Engine
    from digit_ds.training.pace import Pace

    own, begin, backward, calls = Pace.own_nanoseconds, Checkpoints.start, Engine.backward, {"micro": 0}

    def slow_own(self, marks):
        time.sleep(seconds)
        return own(self, marks)

    def begin_save(self, engine, spec, progress, extra):
        from digit_ds.parallel import launch as place

        if place.is_main():
            assert steps_logged(Path(values.run)) == progress.step
        begin(self, engine, spec, progress, extra)

    def broken(self, loss):
        step = 1 + calls["micro"] // 2
        calls["micro"] += 1
        backward(self, loss * float("nan") if step in bad_steps else loss)

    Pace.own_nanoseconds, Checkpoints.start, Engine.backward = slow_own, begin_save, broken
    train(values)


def test_no_checkpoint_is_ahead_of_the_metrics(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=7, checkpoint__every=3)
    launch(train_with_slow_lines, (values, 0.3), 2, tmp_path / "log")
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 8))


def test_a_run_that_diverged_has_the_lines_of_its_bad_steps(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__max_skipped=2, training__steps=9)
    group = start(train_with_slow_lines, (values, 0.3, (3, 4, 5, 6)), 2, tmp_path / "log")
    assert all(status != 0 for status in group.wait())
    assert "stopped at step 4: 2 updates in a row" in group.output()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def train_with_a_slow_file(values: Recipe, seconds: float) -> None:
    """To write a line takes long."""
    from digit_ds.training.metrics import Reporter

    log = Reporter.log

    def slow_log(self, line):
        time.sleep(seconds)
        log(self, line)

    Reporter.log = slow_log
    train(values)


def test_times_of_a_step_hold_its_waits_for_lines(token_shards, tmp_path):
    """What logging takes from the training is in images a second."""
    values = recipe(tmp_path / "run", token_shards, training__steps=8)
    launch(train_with_a_slow_file, (values, 0.5), 1, tmp_path / "log")
    seconds = [line["step_seconds"] for line in metrics(tmp_path / "run")]
    assert sum(seconds[1:]) > 6 * 0.5  # each of steps 2 to 7 waits for the line before; that of step 8 comes after it
    assert sum(8 / line["images_per_second"] for line in metrics(tmp_path / "run")) == pytest.approx(sum(seconds))


def test_the_clock_leaves_out_what_it_is_told_to(monkeypatch):
    from digit_ds.training import metrics as module

    now = {"seconds": 100.0}
    monkeypatch.setattr(module.time, "perf_counter", lambda: now["seconds"])
    clock = module.Clock()
    ticks = []
    for work, logging, saving in ((1.0, 0.25, 0.0), (2.0, 0.5, 30.0), (1.0, 0.0, 0.0)):
        now["seconds"] += work
        ticks.append(clock.tick())
        now["seconds"] += logging
        with clock.paused():
            now["seconds"] += saving
    assert ticks == [1.0, 2.25, 1.5]
    rates = clock.summary(global_batch=19, tokens=2)
    assert rates["images_per_second"] == 19 * 3 / 4.75 and rates["step_seconds_p50"] == 1.5
