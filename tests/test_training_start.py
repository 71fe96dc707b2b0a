"""What training starts from: a released model, at another tensor-parallel size than it was cut for, left as it was."""

import os

import pytest
import torch
from calls import export
from training_parts import launch, recipe, small_messages, start, train, write_shards

from digit_ds.errors import UserError
from digit_ds.model import tensor_parallel
from digit_ds.model.megatron import check_reductions
from digit_ds.model.partition import write_partitioned
from digit_ds.model.released import read_model, save_model
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.weights import initial_state
from digit_ds.parallel.topology import Topology, initialize
from digit_ds.training.engine import _first_weights

SPEC = TransformerSpec(
    kind="prior",
    layers=2,
    width=16,
    heads=4,
    ffn_width=64,
    norm_position="post",
    max_positions=40,
    discriminative_codes=27,
    vq_codes=0,
    classes=3,
    grid=(4, 4),
)


def test_steps_of_no_length_leave_the_given_weights(tmp_path):
    """Cut for 4 ranks, trained on 2 with a vanishing learning rate, exported: the weights that went in came through."""
    given = initial_state(SPEC, seed=7)
    write_partitioned(tmp_path / "cut", SPEC, given, {}, 4)
    values = recipe(
        tmp_path / "run",
        write_shards(tmp_path / "shards"),
        training__start_from=str(tmp_path / "cut"),
        training__steps=2,
        optimizer__learning_rate=1e-30,
        schedule__warmup_start=0.0,
        parallel__tensor=2,
    )
    launch(train, (values,), 2, tmp_path / "logs")
    export(tmp_path / "run", tmp_path / "exported")
    spec, state, provenance = read_model(tmp_path / "exported")
    assert spec == SPEC
    for name, value in given.items():
        assert (state[name] - value).abs().max() < 1e-25, name  # zeros move by the learning rate, nothing else can
    assert not torch.equal(given["output.weight"], initial_state(SPEC, values.training.seed)["output.weight"])

    written = (tmp_path / "exported" / "model.safetensors").stat().st_mtime_ns
    export(tmp_path / "run", tmp_path / "exported")  # as a job that was killed between this and its end
    assert (tmp_path / "exported" / "model.safetensors").stat().st_mtime_ns == written
    save_model(tmp_path / "other", spec, {**state, "output.weight": state["output.weight"] + 1}, provenance)
    with pytest.raises(UserError, match="other: already holds a model"):
        export(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("file", ["zero1.json", "zero2_overlap.json", "zero2_offload.json", "zero3.json"])
def test_bf16_begins_with_the_float32_weights_that_are_drawn(file, tmp_path):
    """Not with rounded ones, whose rounded values stay for many updates. On three ranks, where parts are padded."""
    values = recipe(
        tmp_path / "run",
        write_shards(tmp_path / "shards"),
        deepspeed=small_messages(tmp_path, file),
        training__precision="bf16",
        training__ema_decay=0.5,
        training__steps=1,
        training__global_batch=12,
        optimizer__learning_rate=1e-30,
        optimizer__weight_decay=0.0,
        schedule__warmup_start=0.0,
    )
    launch(train, (values,), 3, tmp_path / "logs")
    for average in (False, True):
        export(tmp_path / "run", tmp_path / f"exported-{average}", ema=average)
        _, state, _ = read_model(tmp_path / f"exported-{average}")
        for name, value in initial_state(SPEC, values.training.seed).items():
            assert (state[name] - value).abs().max() < 1e-25, name


def test_another_models_weights_are_refused_by_the_size_that_differs(tmp_path):
    save_model(tmp_path / "model", SPEC, initial_state(SPEC, seed=7), {})
    values = recipe(tmp_path / "run", tmp_path, training__start_from=str(tmp_path / "model"))
    other = TransformerSpec.from_dict({**SPEC.to_dict(), "discriminative_codes": 28})
    place = Topology(tensor_size=1, tensor_rank=0, data_size=1, data_rank=0, mailbox=None)
    with pytest.raises(UserError, match="discriminative_codes 27, but the recipe and its shards make 28"):
        _first_weights(values, other, place)


def train_without_a_part(values) -> None:
    """Rank 1's file disappears after all files were checked, before they are read."""
    from digit_ds.training import engine

    check = engine._first_weights

    def check_and_remove(*arguments):
        first = check(*arguments)
        if os.environ["RANK"] == "1":
            first._paths[0].unlink()
        return first

    engine._first_weights = check_and_remove
    train(values)


def test_no_rank_waits_for_one_that_cannot_read_its_weights(tmp_path):
    write_partitioned(tmp_path / "cut", SPEC, initial_state(SPEC, seed=7), {}, 2)
    values = recipe(
        tmp_path / "run",
        write_shards(tmp_path / "shards"),
        training__start_from=str(tmp_path / "cut"),
        training__timeout_seconds=20.0,
        parallel__tensor=2,
    )
    group = start(train_without_a_part, (values,), 2, tmp_path / "log")
    assert 0 not in group.wait(100)
    assert "tensor_rank_01_of_02.safetensors: does not exist" in (tmp_path / "log" / "rank0.log").read_text()


def train_without_mpu(values) -> None:
    """As if DeepSpeed were not told which ranks hold slices: it then broadcasts rank 0's over all of them."""
    from digit_ds.training import engine

    read = engine.read_deepspeed_config
    engine.Mpu = lambda: None
    engine.read_deepspeed_config = lambda recipe, _data_size: read(recipe, 2)  # what it takes the ranks for
    train(values)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overwritten_slices_are_noticed(precision, tmp_path):
    values = recipe(
        tmp_path / "run", write_shards(tmp_path / "shards"), parallel__tensor=2, training__precision=precision
    )
    group = start(train_without_mpu, (values,), 2, tmp_path / "log")
    assert 0 not in group.wait()
    assert "deepspeed.initialize changed this rank's weights" in group.output()


def check_reductions_here(lost: bool, expected: str | None) -> None:
    """On one of two tensor-parallel ranks; ``lost``: sums over the ranks are those of this rank alone."""
    initialize(2, 60.0)
    if lost:
        tensor_parallel._sum = lambda x, group: x
    assert check_reductions(torch.device("cpu")) == expected


def test_a_lost_reduction_is_noticed_before_training(tmp_path):
    launch(check_reductions_here, (False, None), 2, tmp_path / "sound")
    problem = "the forward sum over 2 tensor-parallel ranks is [4.0], expected 8"
    launch(check_reductions_here, (True, problem), 2, tmp_path / "lost")
