"""The recipes: they read, they are of the published or stated size and length, DeepSpeed's file fits."""

import importlib.util
from pathlib import Path

import pytest
import torch

from digit_ds.config import load_recipe
from digit_ds.data.shards import ShardManifest
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import Transformer
from digit_ds.model.weights import parameter_count
from digit_ds.training.runs import model_spec

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
OURS = {
    "modern_base_prior": (8192, 200, 216_220_672),
    "guided_class_conditional_base_prior": (8192, 200, 219_377_664),
    "guided_class_conditional_large_prior": (16384, 200, 731_879_424),
    "prior_1.7b": (16384, 200, 1_680_695_296),
    "prior_3.7b": (16384, 200, 3_729_002_496),
    "prior_7b": (16384, 200, 6_582_616_064),
    "rar_base_prior": (8192, 400, 219_377_664 + 256 * 1024),
    "rar_class_conditional_base_prior": (8192, 400, 219_377_664 + 256 * 1024),
}
RECIPE_FACTS = PUBLISHED | OURS


def spec_of(name: str) -> TransformerSpec:
    """The model of a recipe over ImageNet's token shards."""
    manifest = ShardManifest(
        images=IMAGES,
        views=1,
        classes=[f"n{number:08d}" for number in range(1000)],
        grid=[16, 16],
        image_size=256,
        discriminative_codes=RECIPE_FACTS[name][0],
        vq_codes=1024,
        crops="random",
        provenance={},
        skipped=0,
        index_sha256="i",
    )
    return model_spec(load_recipe(RECIPES / f"{name}.yaml"), manifest)


def test_every_recipe_is_known():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(RECIPE_FACTS)


@pytest.mark.parametrize("name", RECIPE_FACTS)
def test_size_and_length_are_those_stated(name):
    """Of the whole model, made at full size without memory."""
    recipe, spec = load_recipe(RECIPES / f"{name}.yaml"), spec_of(name)
    _, epochs, expected = RECIPE_FACTS[name]
    with torch.device("meta"):
        model = Transformer(spec)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameter_count(spec)
    if expected is not None:
        assert count - spec.classes * spec.width == expected
    assert recipe.training.global_batch == 1024
    assert recipe.training.steps * 1024 / IMAGES == pytest.approx(epochs, abs=0.001)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_choices(name):
    recipe, spec = load_recipe(RECIPES / f"{name}.yaml"), spec_of(name)
    assert spec.unpublished == []
    assert spec.norm_position == ("post" if spec.kind == "prior" else "pre")
    assert recipe.optimizer.learning_rate == (3e-4 if spec.kind == "prior" else 5e-4)


def test_the_modern_recipe_differs_from_the_published_one_in_the_layers_alone():
    published, modern = (load_recipe(RECIPES / f"{name}.yaml") for name in ("base_prior", "modern_base_prior"))
    layers = {"norm_position": "pre", "normalization": "rms", "positions": "rotary2d", "activation": "swiglu"}
    expected = published.model.model_copy(update={**layers, "qk_norm": True, "ffn_width": 2688})
    assert modern == published.model_copy(update={"model": expected, "run": "runs/modern_base_prior"})
    assert modern.model.feed_forward % 8 == 0  # up to 8 tensor-parallel ranks
    stated = (RECIPES / "modern_base_prior.yaml").read_text()
    assert f"{parameter_count(spec_of('modern_base_prior')):,} parameters" in stated


@pytest.mark.parametrize("size", ["base", "large"])
def test_guided_recipes_differ_from_the_published_ones_in_class_dropout_alone(size):
    name = f"class_conditional_{size}_prior"
    published, guided = (load_recipe(RECIPES / f"{prefix}{name}.yaml") for prefix in ("", "guided_"))
    assert published.training.class_dropout == 0 and guided.training.class_dropout == 0.1
    training = published.training.model_copy(update={"class_dropout": 0.1})
    assert guided == published.model_copy(update={"training": training, "run": f"runs/guided_{name}"})


def test_headers_say_command_and_hours():
    specification = importlib.util.spec_from_file_location(
        "recipe_hours", RECIPES.parent / "benchmarks/recipe_hours.py"
    )
    hours = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hours)
    for name in PUBLISHED:
        header = (RECIPES / f"{name}.yaml").read_text()
        assert f"digit-ds train ds_configs/{name}.yaml\n" in header
        assert hours.time_line(RECIPES / f"{name}.yaml") in header, "run benchmarks/recipe_hours.py"
    for name in hours.PREDICTED:
        assert hours.time_line(RECIPES / f"{name}.yaml") in (RECIPES / f"{name}.yaml").read_text()
    base = load_recipe(RECIPES / "base_prior.yaml").training
    measured = next(measured for measured in hours.MEASURED if measured.recipe == "base_prior")
    expected = base.steps * base.global_batch / measured.images_per_second / 3600
    assert f"about {expected:.0f} {measured.gpu}-hours" in (RECIPES / "base_prior.yaml").read_text()


@pytest.mark.parametrize("data_size", [1, 8, 16])
def test_deepspeed_takes_them_on_whole_nodes(data_size):
    from digit_ds.training.deepspeed_config import read_deepspeed_config

    for name in RECIPE_FACTS:
        config = read_deepspeed_config(load_recipe(RECIPES / f"{name}.yaml"), data_size)
        assert config["gradient_accumulation_steps"] * config["train_micro_batch_size_per_gpu"] * data_size == 1024
        assert config["bf16"]["enabled"]
