"""Recipes: what is read, and each way of writing one wrong."""

from pathlib import Path

import pytest

from digit_ds.config import load_recipe
from digit_ds.errors import UserError
from digit_ds.training.runs import settle, write_recipe
from digit_ds.training.schedule import default_warmup

MINIMAL = "run: runs/x\ndata: {shards: shards}\ntraining: {steps: 10}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_the_published_base_prior(recipe_file):
    recipe = load_recipe(recipe_file)
    assert (recipe.model.layers, recipe.model.width, recipe.model.heads) == (16, 1024, 16)
    assert recipe.model.norm_position == "post"
    modern = (recipe.model.normalization, recipe.model.positions, recipe.model.activation, recipe.model.qk_norm)
    assert modern == ("layer", "learned", "gelu", False)
    assert recipe.optimizer.betas == (0.9, 0.98)
    assert recipe.schedule.warmup_steps is None and default_warmup(250228) == 6250
    assert recipe.training.label_smoothing == 0.1


def test_warm_up_is_a_share_of_the_run_and_stays_that_of_a_run_that_goes_on(recipe_file, tmp_path):
    def settled(*overrides: str) -> int | None:
        recipe = settle(load_recipe(recipe_file, [f"run={tmp_path / 'run'}", *overrides]))
        write_recipe(tmp_path / "run", recipe)
        return recipe.schedule.warmup_steps

    assert settled("training.steps=200") == settled("training.steps=4000") == 10
    assert settled("training.steps=4000", "schedule.warmup_steps=0") == settled("training.steps=8000") == 0


@pytest.mark.parametrize(
    ("width", "activation", "stated", "expected"),
    [
        (1024, "gelu", "null", 4096),
        (1024, "swiglu", "null", 2688),
        (16, "swiglu", "null", 128),
        (64, "swiglu", "24", 24),
    ],
)
def test_feed_forward_width_keeps_the_number_of_weights(recipe_file, width, activation, stated, expected):
    """Three matrices of 8/3 x width hold what two of 4 x width do: 2,730.7 for 1,024, and 21 x 128 is the nearest."""
    overrides = [f"model.width={width}", f"model.activation={activation}", f"model.ffn_width={stated}"]
    assert load_recipe(recipe_file, overrides).model.feed_forward == expected


def test_overrides_reach_their_field_with_yaml_types(recipe_file):
    recipe = load_recipe(
        recipe_file, ["optimizer.learning_rate=5e-4", "model.kind=ar", "model.class_conditional=false", "run=other"]
    )
    assert recipe.optimizer.learning_rate == 5e-4
    assert recipe.model.kind == "ar"
    assert recipe.run == "other"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.stepz=3"], ["training.stepz", "unknown key", "global_batch"]),
        (["trainin.steps=3"], ["trainin", "unknown key", "training"]),
        (["training.steps=many"], ["training.steps", "'many'", "integer"]),
        (["training.steps=1.5"], ["training.steps", "1.5", "integer"]),
        (["training.steps='3'"], ["training.steps", "'3'", "integer"]),
        (["training.steps=0"], ["training.steps", "0", "greater than or equal to 1"]),
        (["model.kind=gan"], ["model.kind", "'gan'", "prior"]),
        (["model=3"], ["model", "3"]),
        (["run.x=3"], ["run.x", "'run' is a value"]),
        (["steps"], ["'steps'", "section.key=value"]),
        (["model.heads=3"], ["model.heads 3", "model.width is 1024"]),
        (["parallel.tensor=3"], ["parallel.tensor 3", "model.heads is 16"]),
        (["model.positions=rotary2d", "model.width=96"], ["rotary2d", "model.heads is 6", "a multiple of 4"]),
        (["model.normalization=rmsnorm"], ["model.normalization", "'rmsnorm'", "'rms'"]),
        (["model.qk_norm=1"], ["model.qk_norm", "1", "boolean"]),
        (["model.activation=swiglu", "parallel.tensor=16", "model.ffn_width=2744"], ["ffn_width is 2744", "tensor 16"]),
        (["model.kind=ar", "model.class_conditional=true"], ["class_conditional", "ar"]),
        (["training.class_dropout=0.1"], ["training.class_dropout", "class_conditional"]),
        (["optimizer.learning_rate=.inf"], ["optimizer.learning_rate", "inf", "finite number"]),
        (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate", "nan", "finite number"]),
        (["optimizer.betas=[0.9, 1.5]"], ["optimizer.betas.1", "1.5", "less than 1"]),
        (["run=~no_such_user/run"], ["run", "no_such_user", "home folder"]),
        (["training.seed={a: 1, a: 2}"], ["training.seed", "'a' is given twice"]),
        (["training.global_batch=100"], ["training.global_batch is 100", "training.micro_batch 64"]),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(recipe_file, overrides, words):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_refusal_names_the_overrides_that_it_is_about(recipe_file):
    given = ["training.global_batch=100", "training.steps=7", "run=other"]
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, given)
    assert str(caught.value).startswith(f"{recipe_file} with training.global_batch=100: training.global_batch is 100")
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, ["run=other", "optimizer.betas=[0.9, 1.5]"])
    assert str(caught.value).startswith(f"{recipe_file} with optimizer.betas=[0.9, 1.5]: optimizer.betas.1 is 1.5")
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, ["model.kind=ar", "training.order=random", "run=random"])
    assert "with model.kind=ar training.order=random: training.order is random" in str(caught.value)
    for value in ("9" * 3000, "1\n2"):
        with pytest.raises(UserError) as caught:
            load_recipe(recipe_file, [f"training.steps='{value}'"])
        assert len(str(caught.value)) < len(str(recipe_file)) + 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (MINIMAL + "training: {global_batch: 64}\n", "key 'training' is given twice .*line 4"),
        ("run: 2020-13-45\n", "not valid YAML"),
        ("1: 2\n", "mapping of sections"),
        ("run: x\n", "'data' is missing"),
        ("[1, 2]", "list"),
        ("run: [", "not valid YAML"),
        ("", "mapping"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, word):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=word) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_files_in_another_encoding_are_refused(tmp_path, encoding):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(MINIMAL.replace("runs/x", "runs/\u00fc").encode(encoding))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_recipe(path)


def test_the_home_folder_is_meant_by_a_tilde(recipe_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(recipe_file, ["run=~/run", "data.shards=~/shards", "training.precision=float32"])
    assert (recipe.run, recipe.data.shards) == (f"{tmp_path}/run", f"{tmp_path}/shards")
    assert recipe.training.precision == "fp32"


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
