"""The recipes of the paper's models: they read, they are of the published size and length, DeepSpeed's file fits."""

from pathlib import Path

import pytest

from digit_ds.config import load_recipe
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.weights import parameter_count

RECIPES = Path(__file__).parents[1] / "ds_configs"
IMAGES = 1_281_167

# Name -> discriminative codes, epochs, parameters without the 1,000 class embeddings.
PUBLISHED = {
    "base_prior": (8192, 200, 219_377_664),
    "class_conditional_base_prior": (8192, 200, 219_377_664),
    "large_prior": (16384, 200, 731_879_424),
    "class_conditional_large_prior": (16384, 200, 731_879_424),
    "ar_decoder_base": (8192, 200, None),
    "ar_decoder_large": (16384, 200, None),
    "nar_decoder_base": (8192, 200, None),
    "vq_baseline": (0, 200, None),
    "class_conditional_vq_baseline": (0, 300, None),
}


def test_every_recipe_is_known():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_length_are_the_published_ones(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    codes, epochs, expected = PUBLISHED[name]
    model = recipe.model
    spec = TransformerSpec(
        kind=model.kind,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        ffn_width=model.ffn_width or 4 * model.width,
        norm_position=model.norm_position,
        max_positions=model.max_positions,
        discriminative_codes=codes,
        vq_codes=0 if model.kind == "prior" else 1024,
        classes=1000 if model.class_conditional else 0,
    )
    if expected is not None:
        assert parameter_count(spec) - spec.classes * spec.width == expected
    assert model.norm_position == ("post" if model.kind == "prior" else "pre")
    assert recipe.training.global_batch == 1024
    assert recipe.training.steps * 1024 / IMAGES == pytest.approx(epochs, abs=0.001)
    assert recipe.optimizer.learning_rate == (3e-4 if model.kind == "prior" else 5e-4)


@pytest.mark.parametrize("data_size", [1, 8, 16])
def test_deepspeed_takes_them_on_whole_nodes(data_size):
    from digit_ds.training.deepspeed_config import read_deepspeed_config

    for name in PUBLISHED:
        config = read_deepspeed_config(load_recipe(RECIPES / f"{name}.yaml"), data_size)
        assert config["gradient_accumulation_steps"] * config["train_micro_batch_size_per_gpu"] * data_size == 1024
        assert config["bf16"]["enabled"]
