"""The hours in the headers of ``ds_configs/*.yaml``, from measured training speed.

    python benchmarks/recipe_hours.py       # rewrites the lines "# Time: about ..."

A recipe takes ``images x operations an image / (peak x MFU)``, with the MFU measured on the recipe itself, or else on a
model of its width. A new figure goes into MEASURED (and into docs/results.md), nowhere else. Recipes for more GPUs than
were measured on state what ``digit-ds plan`` predicts.
"""

import re
from pathlib import Path
from typing import NamedTuple

from digit_ds.config import Recipe, load_recipe
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.estimate import shards_to_come
from digit_ds.training.flops import flops_per_image
from digit_ds.training.plan import predicted_hours
from digit_ds.training.runs import model_spec
from digit_ds.training.settings import PlanSettings

STATED = "^# Time: about .*$"
RECIPES = Path(__file__).parents[1] / "ds_configs"
PEAK = 989e12
"""Dense bf16 operations a second of one H100 or H200."""
IMAGES, CLASSES, VQ_CODES = 1_281_167, 1000, 1024


class Measured(NamedTuple):
    """Training speed of one model on one GPU (``benchmarks/train_speed.py``)."""

    recipe: str
    images_per_second: float
    gpu: str


MEASURED = (
    Measured("base_prior", 1288, "H200"),
    Measured("large_prior", 385, "H100"),
    Measured("modern_base_prior", 1123, "H100"),
)
PREDICTED = {"prior_1.7b": 64, "prior_3.7b": 64, "prior_7b": 64}
"""H100s of recipes that no measurement is near to."""


def discriminative_codes(recipe: Recipe) -> int:
    """Codes of the token shards that a recipe names: ``..._8k`` or ``..._16k``."""
    return int(re.search(r"_(\d+)k/", recipe.data.shards)[1]) * 1024


def spec_of(recipe: Recipe) -> TransformerSpec:
    """The recipe's model, for 16 x 16 tokens of ImageNet."""
    return model_spec(recipe, shards_to_come(IMAGES, 16, discriminative_codes(recipe), VQ_CODES, CLASSES))


def operations(recipe: Recipe) -> float:
    """Floating-point operations of one training image."""
    return flops_per_image(spec_of(recipe))


def time_line(path: Path) -> str:
    """The line of a recipe's header."""
    recipe = load_recipe(path)
    images = recipe.training.steps * recipe.training.global_batch
    if path.stem in PREDICTED:
        gpus = PREDICTED[path.stem]
        hours = predicted_hours(PlanSettings(recipe=str(path), gpus=gpus), recipe, spec_of(recipe))
        speed = images / hours / 3600
        mfu = speed * operations(recipe) / (gpus * PEAK)
        return (
            f"# Time: about {hours * gpus:,.0f} H100-hours on {gpus} of them, predicted ({speed:,.0f} images/s, "
            f"{mfu:.1%} MFU)."
        )
    models = {measured: load_recipe(RECIPES / f"{measured.recipe}.yaml") for measured in MEASURED}
    own = [measured for measured in MEASURED if measured.recipe == path.stem]
    alike = [measured for measured, model in models.items() if model.model.width == recipe.model.width]
    measured = (own + alike)[0]
    mfu = measured.images_per_second * operations(models[measured]) / PEAK
    hours = images * operations(recipe) / (PEAK * mfu) / 3600
    return (
        f"# Time: about {hours:.0f} {measured.gpu}-hours at {100 * mfu:.0f} % MFU, measured with {measured.recipe} "
        f"({measured.images_per_second:,.0f} images/s)."
    )


def main() -> None:
    """Rewrite the headers that state hours."""
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if re.search(STATED, text, re.MULTILINE):
            line = time_line(path)
            path.write_text(re.sub(STATED, line, text, flags=re.MULTILINE), encoding="utf-8")
            print(f"{path.name:40} {line}")


if __name__ == "__main__":
    main()
