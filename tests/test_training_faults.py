"""A run that is killed, lacks memory, reads NaN or is moved continues with equal results or stops with an error."""

import ctypes
import fnmatch
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
import torch
from training_parts import (
    launch,
    metrics,
    recipe,
    small_messages,
    start,
    steps_logged,
    train,
    whole_state,
    write_shards,
)

from digit_ds.config import Recipe
from digit_ds.errors import run_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def same_course(run: Path, straight: Path) -> None:
    """Every logged step once, and all its numbers that do not measure time bit-equal."""
    ours, theirs = metrics(run), metrics(straight)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs):
        for key in ("images", "loss", "nll", "grad_norm", "lr", "sample_ids_hash", "skipped_updates"):
            assert line[key] == expected[key], (line["step"], key)


def stored(run: Path):
    from digit_ds.training.stored import StoredState, newest_checkpoint

    return StoredState(newest_checkpoint(run / "checkpoints"))


def wait_for(condition, seconds: float = 150.0) -> None:
    """Poll until ``condition()``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


MOMENTS = ("tensor-*.safetensors", "tensor-*.json", "manifest.json", "latest")
"""Files of a save in the order in which they are written."""


def train_and_stop_in_a_save(values: Recipe, moment: str, reached: Path) -> None:
    """Before the first file of that name is written, tell by the file ``reached`` and go no further."""
    from digit_ds.training import checkpoint

    def halting(write):
        def halt(path, *arguments):
            if fnmatch.fnmatch(path.name, moment):
                reached.touch()
                time.sleep(600)
            write(path, *arguments)

        return halt

    checkpoint.write_atomically, checkpoint.write_json = map(
        halting, (checkpoint.write_atomically, checkpoint.write_json)
    )
    train(values)


@pytest.mark.fault(
    "kill -9 of any rank at any moment, also inside a save",
    stage="training",
    outcome="the same call continues from the newest complete checkpoint; equal metrics and weights",
    status="-",
    lost="steps since that checkpoint, which are done again",
)
def test_killed_at_twenty_moments_ends_as_if_never_killed(token_shards, tmp_path):
    """Ten of them at random, ten inside a save, before each of its files in turn."""
    options = {"training__steps": 120, "model__dropout": 0.2, "checkpoint__every": 2}
    options["deepspeed"] = small_messages(tmp_path, "zero2_overlap.json")
    straight = recipe(tmp_path / "straight", token_shards, **options)
    launch(train, (straight,), 2, tmp_path / "log-straight")
    values = recipe(tmp_path / "run", token_shards, **options)
    run, chance = tmp_path / "run", random.Random(0)
    for attempt in range(20):
        if attempt % 2:
            reached = tmp_path / f"reached-{attempt}"
            moment = MOMENTS[attempt // 2 % len(MOMENTS)]
            group = start(train_and_stop_in_a_save, (values, moment, reached), 2, tmp_path / "log")
            wait_for(reached.exists)
        else:
            enough = steps_logged(run) + chance.randint(1, 4)
            group = start(train, (values,), 2, tmp_path / "log")
            wait_for(lambda lines=enough: steps_logged(run) >= lines)
            time.sleep(chance.random() * 0.05)
        group.kill()
        group.wait()
    assert steps_logged(run) < 120, "each attempt found something to do"
    launch(train, (values,), 2, tmp_path / "log")
    same_course(run, tmp_path / "straight")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        expected = whole_state(stored(tmp_path / "straight"), kind)
        assert all(torch.equal(value, expected[name]) for name, value in whole_state(stored(run), kind).items())


def save_again(values: Recipe) -> None:
    """Restore the newest checkpoint at this layout and save it at once, without a step."""
    from digit_ds.parallel import topology
    from digit_ds.training.loop import _Run
    from digit_ds.training.runs import settle

    place = topology.initialize(values.parallel.tensor, values.training.timeout_seconds)
    run = _Run(settle(values), place, None, None)
    (run.folder / "checkpoints" / "latest").unlink(missing_ok=True)
    run._save(wait=True)
    topology.finish()


def test_layout_may_change_between_runs(token_shards, tmp_path):
    options = {"training__ema_decay": 0.9, "model__dropout": 0.1}
    straight = recipe(tmp_path / "straight", token_shards, training__steps=18, **options)
    launch(train, (straight,), 1, tmp_path / "log")
    run = tmp_path / "run"
    files = [small_messages(tmp_path, f"{name}.json") for name in ("zero0", "zero1", "zero2_overlap", "zero3")]
    for steps, tensor, world, stage in ((6, 1, 2, 1), (9, 2, 4, 2), (12, 2, 2, 3), (15, 4, 4, 2), (18, 1, 1, 0)):
        values = recipe(
            run, token_shards, training__steps=steps, parallel__tensor=tensor, deepspeed=files[stage], **options
        )
        if steps > 6:  # the state survives the reshape bit for bit
            before = {kind: whole_state(stored(run), kind) for kind in ("weight", "exp_avg", "exp_avg_sq", "average")}
            launch(save_again, (values,), world, tmp_path / f"log-again-{steps}")
            assert stored(run).manifest["layout"] == {"tensor": tensor, "data": world // tensor, "zero": stage}
            for kind, state in before.items():
                after = whole_state(stored(run), kind)
                assert all(torch.equal(value, after[name]) for name, value in state.items()), kind
        launch(train, (values,), world, tmp_path / f"log-{steps}")
    for line, expected in zip(metrics(run), metrics(tmp_path / "straight"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert line["sample_ids_hash"] == expected["sample_ids_hash"]


def train_with_signals_taken(values: Recipe) -> None:
    """In the first step all signals are taken behind Python's back, as LLVM does where Triton compiles a kernel."""
    from digit_ds.training.engine import Engine

    original = Engine.loss

    def loss(self, *arguments):
        for number in (signal.SIGUSR1, signal.SIGTERM):
            ctypes.CDLL(None).signal(number, 1)  # SIG_IGN
        Engine.loss = original
        return original(self, *arguments)

    Engine.loss = loss
    train(values)


@pytest.mark.fault(
    "SIGTERM, SIGUSR1 or Ctrl-C on one rank",
    stage="training",
    outcome="all ranks finish the step and at most one more, and save it",
    status="75",
    lost="nothing",
)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_to_one_rank_stops_and_saves_all(number, token_shards, tmp_path):
    straight = recipe(tmp_path / "straight", token_shards, training__steps=30)
    launch(train, (straight,), 1, tmp_path / "log-straight")
    values = recipe(tmp_path / "run", token_shards, training__steps=30)
    group = start(train_with_signals_taken, (values,), 2, tmp_path / "log")
    wait_for(lambda: steps_logged(tmp_path / "run") > 3)
    os.kill(group.processes[1].pid, number)
    assert group.wait() == [75, 75]
    step = stored(tmp_path / "run").manifest["progress"]["step"]
    assert group.output().count(f"stopped by signal at step {step}") == 2
    assert 3 < step < 30 and len(metrics(tmp_path / "run")) == step
    launch(train, (values,), 2, tmp_path / "log-rest")
    assert len(metrics(tmp_path / "run")) == 30
    assert metrics(tmp_path / "run")[-1]["sample_ids_hash"] == metrics(tmp_path / "straight")[-1]["sample_ids_hash"]


def train_with_a_signal_in_step_five(values: Recipe) -> None:
    from digit_ds.parallel import launch as place
    from digit_ds.training.engine import Engine

    original, calls = Engine.loss, {"micro": 0}

    def loss(self, *arguments):
        calls["micro"] += 1
        if place.rank() == 1 and calls["micro"] == 9:  # two micro-batches a step
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *arguments)

    Engine.loss = loss
    train(values)


def test_ranks_that_do_not_wait_for_each_other_stop_together_one_step_later(token_shards, tmp_path):
    """Between logged lines the news of a step is read after the next one."""
    straight = recipe(tmp_path / "straight", token_shards, training__steps=6)
    launch(train, (straight,), 1, tmp_path / "log-straight")
    values = recipe(tmp_path / "run", token_shards, training__steps=30, monitor__log_every=1000)
    group = start(train_with_a_signal_in_step_five, (values,), 2, tmp_path / "log")
    assert group.wait() == [75, 75], group.output()
    assert group.output().count("stopped by signal at step 6") == 2
    (line,), expected = metrics(tmp_path / "run"), metrics(tmp_path / "straight")[-1]
    assert line["step"] == 6 and line["sample_ids_hash"] == expected["sample_ids_hash"]
    assert f"{stored(tmp_path / 'run').progress.samples_hash:016x}" == expected["sample_ids_hash"]


def train_in_a_terminal(values: Recipe) -> None:
    """As in a process of its own: Ctrl-C is not ignored, as in a shell's background, and no server forks."""
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train(values)


@pytest.mark.fault(
    "the same signals on all processes of a rank, as srun and scancel send them",
    stage="training",
    outcome="all ranks finish the step and at most one more, and save it",
    status="75",
    lost="nothing",
)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signal_to_all_processes_of_a_rank_stops_and_saves(number, token_shards, tmp_path):
    """As srun and a terminal send it: the processes that load data get it too, and must not end before the step."""
    values = recipe(tmp_path / "run", token_shards, training__steps=100_000, data__workers=2)
    group = start(train_in_a_terminal, (values,), 2, tmp_path / "log")
    try:
        wait_for(lambda: steps_logged(tmp_path / "run") > 3)
        rank = psutil.Process(group.processes[1].pid)
        helpers = rank.children()
        assert len(helpers) >= 2
        for process in [*helpers, rank]:
            process.send_signal(number)
        assert group.wait(60) == [75, 75], group.output()
    finally:
        group.kill()
    step = stored(tmp_path / "run").manifest["progress"]["step"]
    assert group.output().count(f"stopped by signal at step {step}") == 2
    assert "Traceback" not in group.output()
    wait_for(lambda: not any(helper.is_running() for helper in helpers), 10)


def test_loading_processes_change_nothing_of_the_course(token_shards, tmp_path):
    """Killed, and continued with another number of them."""
    straight = recipe(tmp_path / "straight", token_shards, training__steps=120)
    launch(train, (straight,), 1, tmp_path / "log-straight")
    for workers in (2, 1):
        values = recipe(tmp_path / "run", token_shards, training__steps=120, data__workers=workers, checkpoint__every=5)
        group = start(train_in_a_terminal, (values,), 1, tmp_path / f"log-{workers}")
        if workers == 2:
            wait_for(lambda: steps_logged(tmp_path / "run") > 12)
            group.kill()
        assert group.wait() == [-9 if workers == 2 else 0], group.output()
    same_course(tmp_path / "run", tmp_path / "straight")


def train_as_a_command(values: Recipe) -> None:
    multiprocessing.set_start_method("fork", force=True)
    run_command(lambda _arguments: train(values), [])


@pytest.mark.fault(
    "a process that loads data is killed",
    stage="training",
    outcome="one line; the same call continues",
    status="2",
    lost="steps since the last checkpoint",
)
def test_a_killed_loading_process_ends_the_run_with_a_sentence(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=100_000, data__workers=2)
    group = start(train_as_a_command, (values,), 1, tmp_path / "log")
    try:
        wait_for(lambda: steps_logged(tmp_path / "run") > 3)
        psutil.Process(group.processes[0].pid).children()[-1].kill()
        assert group.wait(60) == [2], group.output()
    finally:
        group.kill()
    (error,) = (line for line in group.output().splitlines() if line.startswith("error: "))
    assert re.fullmatch(
        r"error: a process that loads data ended \(DataLoader worker \(pid.*run the same command again to continue",
        error,
    )
    assert "Traceback" not in group.output()


@pytest.mark.fault(
    "a token shard is damaged",
    stage="training",
    outcome="refused by its hash when it enters the cache",
    status="2",
    lost="steps since the last checkpoint",
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_ends_the_run_with_a_sentence(workers, tmp_path):
    shards = write_shards(tmp_path / "shards")
    damaged = next((shards / "block-00001").glob("*.zstd"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    values = recipe(tmp_path / "run", shards, data__workers=workers)
    group = start(train_as_a_command, (values,), 1, tmp_path / "log")
    assert group.wait() == [2], group.output()
    (error,) = (line for line in group.output().splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {damaged}: is damaged, its sha256 is not the ")
    assert "Traceback" not in group.output()


def train_with_a_signal_at_the_start(values: Recipe) -> None:
    """Rank 1 is told to stop while the model is built."""
    from digit_ds.parallel import launch as place
    from digit_ds.training.engine import Engine

    original = Engine.__init__

    def build(self, *arguments):
        original(self, *arguments)
        if place.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    Engine.__init__ = build
    train(values)


@pytest.mark.fault(
    "a signal while a run is being made ready",
    stage="training",
    outcome="all ranks leave before the first step",
    status="75",
    lost="nothing",
)
def test_signal_before_the_first_step_stops_all_without_one(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=5)
    group = start(train_with_a_signal_at_the_start, (values,), 2, tmp_path / "log")
    assert group.wait() == [75, 75], group.output()
    assert group.output().count("stopped by signal at step 0") == 2
    assert steps_logged(tmp_path / "run") == 0
    launch(train, (values,), 2, tmp_path / "log-again")
    assert metrics(tmp_path / "run")[-1]["step"] == 5


def train_with_nan(values: Recipe, bad_steps: list[int]) -> None:
    """One rank's loss, and so its gradient, is NaN in some steps."""
    from digit_ds.parallel import launch as place
    from digit_ds.training.engine import Engine

    original, calls = Engine.backward, {"micro": 0}

    def backward(self, loss):
        step = 1 + calls["micro"] // 2  # two micro-batches a step
        calls["micro"] += 1
        original(self, loss * float("nan") if step in bad_steps and place.rank() == 1 else loss)

    Engine.backward = backward
    train(values)


@pytest.mark.fault(
    "gradient not finite on one rank",
    stage="training",
    outcome="the update is skipped on all ranks; the images are named",
    status="-",
    lost="that update",
)
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 2)])
def test_nan_on_one_rank_skips_the_update_on_all(precision, stage, token_shards, tmp_path):
    options = {
        "training__steps": 6,
        "training__precision": precision,
        "deepspeed": small_messages(tmp_path, f"zero{stage}.json"),
    }
    values = recipe(tmp_path / "run", token_shards, checkpoint__every=1, checkpoint__keep_last=9, **options)
    output = launch(train_with_nan, (values, [3]), 2, tmp_path / "log")
    assert output.count("step 3: gradient not finite, update skipped") == 2 and "class1/" in output
    lines = metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines][-2:] == [1, 1]
    assert lines[2]["grad_norm"] is None or lines[2]["grad_norm"] < 0
    from digit_ds.training.stored import StoredState

    states = [StoredState(tmp_path / "run" / "checkpoints" / f"step_{step:08d}") for step in (2, 3, 4)]
    assert [state.manifest["progress"]["adam_steps"] for state in states] == [2, 2, 3]
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        second, third, fourth = (whole_state(state, kind) for state in states)
        assert all(torch.equal(value, third[name]) for name, value in second.items()), kind
        assert any(not torch.equal(value, fourth[name]) for name, value in third.items())
        assert all(value.isfinite().all() for value in fourth.values())


@pytest.mark.fault(
    "training.max_skipped such updates in a row",
    stage="training",
    outcome="the run stops with advice",
    status="2",
    lost="steps since the last checkpoint",
)
def test_many_skipped_updates_stop_the_run_with_advice(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__max_skipped=3)
    group = start(train_with_nan, (values, [3, 4, 5, 6, 7, 8]), 2, tmp_path / "log")
    assert all(status != 0 for status in group.wait())
    assert "3 updates in a row had gradients that are not finite" in group.output()
    assert "optimizer.learning_rate" in group.output()


def train_slowly(values: Recipe, seconds: float) -> None:
    """Rank 1 computes slowly in the first 15 steps, later rank 0 waits for its data: so long a micro-batch."""
    from digit_ds.data.stream import TokenStream
    from digit_ds.parallel import launch as place
    from digit_ds.training.engine import Engine

    loss, batches, calls = Engine.loss, TokenStream.batches, {"micro": 0}

    def slow_loss(self, *arguments):
        calls["micro"] += 1
        if place.rank() == 1 and calls["micro"] <= 30:  # two micro-batches a step
            time.sleep(seconds)
        return loss(self, *arguments)

    def slow_batches(self, *arguments):
        for batch in batches(self, *arguments):
            if place.rank() == 0 and calls["micro"] >= 30:
                time.sleep(seconds)
            yield batch

    Engine.loss, TokenStream.batches = slow_loss, slow_batches
    train(values)


def test_the_rank_that_holds_the_others_up_is_named(token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=30, monitor__log_every=5)
    output = launch(train_slowly, (values, 0.2), 2, tmp_path / "log")  # far beyond what a loaded machine adds
    lines = metrics(tmp_path / "run")
    for line, slowest in zip(lines, (1, 1, 1, 0, 0, 0), strict=True):
        assert line["slowest_rank"] == slowest
        assert 0.4 <= line["rank_seconds_max"] <= line["step_seconds"]
        assert line["rank_seconds_median"] < line["rank_seconds_max"] - 0.25, "the other one's wait is not its work"
    warnings = re.findall(r"^warning: (.*) delays the other ranks", output, re.MULTILINE)
    assert warnings == [f"rank {rank} ({socket.gethostname()})" for rank in (1, 0)]


def test_few_milliseconds_hold_nobody_up(token_shards, tmp_path):
    """On a model so small they are a large share of a step, and they would fill the log."""
    values = recipe(tmp_path / "run", token_shards, training__steps=30, monitor__log_every=5)
    output = launch(train_slowly, (values, 0.004), 2, tmp_path / "log")
    assert metrics(tmp_path / "run")[1]["rank_seconds_max"] >= 0.008
    assert "delays the other ranks" not in output


def train_until_stuck(values: Recipe) -> None:
    """Rank 1 never comes back from step 5."""
    from digit_ds.parallel import launch as place
    from digit_ds.training.engine import Engine

    original, calls = Engine.loss, {"micro": 0}

    def stuck_in_here(self, *arguments):
        calls["micro"] += 1
        if place.rank() == 1 and calls["micro"] > 8:
            time.sleep(600)
        return original(self, *arguments)

    Engine.loss = stuck_in_here
    train(values)


@pytest.mark.fault(
    "a rank dies or hangs",
    stage="training",
    outcome="stacks of all ranks are written at 0.8 of training.timeout_seconds; the others end after it",
    status="not 0",
    lost="steps since the last checkpoint",
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT, signal.SIGSTOP, "stuck"])
def test_dead_or_hung_rank_ends_the_job(how, token_shards, tmp_path):
    values = recipe(tmp_path / "run", token_shards, training__steps=10000, training__timeout_seconds=8.0)
    group = start(train_until_stuck if how == "stuck" else train, (values,), 2, tmp_path / "log")
    wait_for(lambda: steps_logged(tmp_path / "run") > 3)
    if how != "stuck":
        os.kill(group.processes[1].pid, how)
    begin = time.monotonic()
    group.processes[0].join(40)
    assert group.processes[0].exitcode not in (None, 0), group.output()[-3000:]
    assert time.monotonic() - begin < 30
    group.processes[1].kill()
    waiting, stuck = ((tmp_path / "log" / f"rank{rank}.log").read_text() for rank in (0, 1))
    if how == signal.SIGABRT:
        assert re.search(r"Fatal Python error: Aborted.*training/loop\.py\", line \d+ in run\n", stuck, re.DOTALL)
    if how in (signal.SIGSTOP, "stuck"):  # where each rank was, before the timeout
        assert re.search(
            r"rank 0 \(\S+\) has finished no step for [6-8] s.*training/loop\.py\", line \d+, in run\n",
            waiting,
            re.DOTALL,
        )
    if how == "stuck":
        assert re.search(r"rank 1 \(\S+\) has finished no step.*thread MainThread:.*stuck_in_here", stuck, re.DOTALL)


def train_on_full_disk(values: Recipe) -> None:
    """From step 5 on no file can grow past 48 KiB: the metrics can, a checkpoint cannot."""
    from digit_ds.training.checkpoint import Checkpoints

    original = Checkpoints.start

    def start_save(self, engine, spec, progress, extra):
        if progress.step >= 5:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (48 * 1024, resource.RLIM_INFINITY))
        original(self, engine, spec, progress, extra)

    Checkpoints.start = start_save
    train(values)


@pytest.mark.fault(
    "disk full while a checkpoint is written",
    stage="training",
    outcome="warning; training goes on and the last good checkpoint stays",
    status="-",
    lost="that checkpoint",
)
def test_full_disk_leaves_the_last_good_checkpoint(token_shards, tmp_path):
    options = {"training__steps": 12, "checkpoint__every": 4}
    launch(train, (recipe(tmp_path / "straight", token_shards, **options),), 2, tmp_path / "log-straight")
    values = recipe(tmp_path / "run", token_shards, **options)
    group = start(train_on_full_disk, (values,), 2, tmp_path / "log")
    assert all(status != 0 for status in group.wait())
    assert "the checkpoint of step 8 could not be written" in group.output()
    assert "the last complete checkpoint stays" in group.output()
    assert stored(tmp_path / "run").manifest["progress"]["step"] == 4
    launch(train, (values,), 2, tmp_path / "log-rest")
    same_course(tmp_path / "run", tmp_path / "straight")
