"""``training.micro_batch: auto``: what is chosen, and that a run keeps it; ``estimate`` refuses what training does."""

from pathlib import Path

import pytest
import yaml
from training_parts import launch, recipe, train, write_shards

from digit_ds.cli import main
from digit_ds.config import load_recipe
from digit_ds.data.shards import read_manifest
from digit_ds.errors import UserError
from digit_ds.training.deepspeed_config import read_deepspeed_config
from digit_ds.training.estimate import SHARE, largest, memory_by_part, with_micro_batch
from digit_ds.training.runs import model_spec

SHIPPED = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_accepted_on_one_to_512_ranks(path):
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        for gpus in (1, 2, 4, 8):
            config = read_deepspeed_config(load_recipe(path), nodes * gpus)
            assert config["train_batch_size"] == 1024


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "shards")


def test_the_largest_that_fits_is_chosen(token_shards, tmp_path):
    values = recipe(tmp_path, token_shards, training__global_batch=96, training__micro_batch="auto")
    spec = model_spec(values, read_manifest(token_shards))

    def needed(number: int) -> float:
        return sum(memory_by_part(with_micro_batch(values, number), spec, 2, 1, False).values())

    assert largest(values, spec, 2, 1.0) == 48
    for number, larger in ((16, 24), (1, 2)):
        between = (needed(number) + needed(larger)) / 2 / SHARE
        assert largest(values, spec, 2, between) == number
    with pytest.raises(UserError, match="micro_batch is auto, but a single image needs"):
        largest(values, spec, 2, needed(1) / 2 / SHARE)


@pytest.mark.parametrize("value", ["many", 0, 1.5, True, None])
def test_other_values_are_refused(tmp_path, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"run": "x", "data": {"shards": "x"}, "training": {"steps": 1, "micro_batch": value}})
    )
    with pytest.raises(UserError, match=r"training.micro_batch is .*, expected: a whole number of at least 1, or auto"):
        load_recipe(path)


def test_a_run_keeps_the_number_that_it_began_with(token_shards, tmp_path):
    def run(steps: int, world: int, **overrides) -> tuple[str, int]:
        values = recipe(
            tmp_path / "run", token_shards, training__steps=steps, training__micro_batch="auto",
            schedule__warmup_steps=4, **overrides,
        )  # fmt: skip
        said = launch(train, (values,), world, tmp_path / f"{steps}")
        return said, yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["micro_batch"]

    said, number = run(2, 1)
    assert number == 8 and "training.micro_batch is 8 of 8 images of a rank" in said
    assert "warning: schedule.warmup_steps 4 is not less than training.steps 2" in said
    said, number = run(4, 2)
    assert number == 4 and said.count("training.micro_batch is 4 of 4") == 1
    assert "it was 8, which does not divide that: dropout masks change" in said
    said, number = run(6, 1)
    assert number == 4 and "training.micro_batch is 4, as this run began" in said and "warning" not in said


def test_estimate_needs_no_shards_and_refuses_what_training_refuses(token_shards, tmp_path, capsys):
    path = str(SHIPPED[[path.stem for path in SHIPPED].index("ar_decoder_base")])

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["estimate", path, *arguments])
        output = capsys.readouterr()
        return output.out if not ended.value.code else output.err

    planned = ["--images", "1281167", "--grid", "16", "--codes", "8192"]
    said = call(*planned, "--vq-codes", "1024", "--gpus", "8")
    assert "1,281,167 images" in said and "513 tokens" in said and "micro-batch 128" in said
    smaller = call(*planned, "--vq-codes", "1024", "--gpus", "8", "--memory", "24")
    assert "micro-batch 128" not in smaller
    for arguments, message in (
        (planned, "has no VQ tokens, which model.kind ar needs"),
        (planned[:2], "--images is given without --grid and --codes"),
        ([*planned[:5], "0"], "codes is 0, expected: greater than or equal to 1"),
        (
            [*planned, "--vq-codes", "1024", "--gpus", "3"],
            "training.global_batch is 1024, expected a multiple of 3 data-par",
        ),
        (["deepspeed=zero0.json", *planned, "--vq-codes", "9"], "zero_optimization.stage is 0, expected 1 or more"),
        ([*planned, "--vq-codes", "9", "--mfu", "0"], "mfu is 0.0, expected: greater than 0"),
        ([*planned, "--vq-codes", "9", "--memory", "1"], "a single image needs about"),
    ):
        said = call(*arguments)
        assert message in said and said.count("\n") == 1, said
