"""``digit-ds plan``: its predictions against measured steps, what it leaves out, and the recipes that follow it."""

import runpy
from pathlib import Path

import pytest
from test_recipes import RECIPES, spec_of

from digit_ds.cli import main
from digit_ds.config import load_recipe
from digit_ds.errors import UserError
from digit_ds.model.weights import check_tensor_size, parameter_count
from digit_ds.training.deepspeed_config import read_deepspeed_config
from digit_ds.training.estimate import largest, memory_by_part, with_micro_batch, zero_of
from digit_ds.training.plan import GPUS, layouts
from digit_ds.training.settings import PlanSettings

PLANNED = ("--images", "1281167", "--grid", "16", "--codes", "16384")


def settings(name: str, **options) -> PlanSettings:
    return PlanSettings.read({"recipe": f"{name}.yaml", **options})


DRAWN = runpy.run_path(str(RECIPES.parent / "docs" / "draw_scaling.py"))


@pytest.mark.parametrize("row", DRAWN["MEASURED"], ids=lambda row: f"{row.gpus} GPUs, {row.layout.title}, {row.link}")
def test_predictions_are_within_a_tenth_of_what_was_measured(row):
    """On H100 over NVLink, and without it at 26 GB/s; the figures stand in docs/training.md and docs/scaling.md."""
    assert DRAWN["predicted"](row) == pytest.approx(row.images_per_second, rel=0.1)


@pytest.mark.parametrize(("name", "gpus", "kind"), [("base_prior", 8, "a100-40"), ("prior_7b", 32, "h100")])
def test_what_training_refuses_or_what_does_not_fit_is_left_out(name, gpus, kind):
    spec = spec_of(name)
    found = layouts(settings(name, gpus=gpus, gpu=kind), load_recipe(RECIPES / f"{name}.yaml"), spec)
    assert {layout.recipe.parallel.tensor for layout in found} == {1, 2, 4, 8}
    assert len({tuple(layout.overrides) for layout in found}) == len(found) > 20
    for layout in found:
        tensor = layout.recipe.parallel.tensor
        check_tensor_size(spec, tensor)
        read_deepspeed_config(layout.recipe, gpus // tensor)
        parts = memory_by_part(layout.recipe, spec, gpus // tensor, *zero_of(layout.recipe))
        assert sum(parts.values()) == pytest.approx(layout.memory) and layout.memory < 0.9 * GPUS[kind].memory
    speeds = [layout.images_per_second for layout in found]
    assert speeds == sorted(speeds, reverse=True)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"no layout of prior_7b\.yaml fits 2 x a100-40 with 39\.4 GiB"):
        spec = spec_of("prior_7b")
        layouts(settings("prior_7b", gpus=2, gpu="a100-40"), load_recipe(RECIPES / "prior_7b.yaml"), spec)


@pytest.mark.parametrize("name", ["prior_1.7b", "prior_3.7b", "prior_7b"])
def test_large_recipes_have_the_layout_that_is_planned(name, capsys):
    """The printed command's overrides are what the recipe says, where auto is the number that fits."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(RECIPES / f"{name}.yaml"), *PLANNED, "--gpus", "64"])
    assert not ended.value.code
    output = capsys.readouterr().out
    command = output[output.index("digit-ds train") :].replace("\\\n", " ").split()
    recipe, spec = load_recipe(RECIPES / f"{name}.yaml"), spec_of(name)
    settled = with_micro_batch(recipe, largest(recipe, spec, 64, GPUS["h100"].memory))
    assert load_recipe(Path(command[2]), command[3:]) == settled
    assert f"{parameter_count(spec):,} parameters" in output
    assert f"{parameter_count(spec):,}." in (RECIPES / f"{name}.yaml").read_text()
