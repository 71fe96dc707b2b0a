"""The hours in the headers of ``ds_configs/*.yaml``, from measured training speed.

    python benchmarks/recipe_hours.py       # rewrites the lines "# Time: ..."

A recipe takes ``images x operations an image / (peak x MFU)``, with the MFU measured on the model of its width, or on
the base prior where that was not measured. A new figure goes into MEASURED (and into docs/results.md), nowhere else.
"""

import re
from pathlib import Path
from typing import NamedTuple

from digit_ds.config import Recipe, load_recipe
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.metrics import flops_per_image

RECIPES = Path(__file__).parents[1] / "ds_configs"
PEAK = 989e12
"""Dense bf16 operations a second of one H200."""
CLASSES, VQ_CODES = 1000, 1024


class Measured(NamedTuple):
    """Training speed of one model on one H200 (``benchmarks/train_speed.py``)."""

    recipe: str
    images_per_second: float


MEASURED = {1024: Measured("base_prior", 1288)}
"""By width of the model."""


def recipe_spec(recipe: Recipe, codes: int) -> TransformerSpec:
    """The model of a recipe over 16 x 16 tokens of ImageNet; ``codes``: discriminative ones."""
    model = recipe.model
    return TransformerSpec(
        kind=model.kind,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        ffn_width=model.ffn_width or 4 * model.width,
        norm_position=model.norm_position,
        max_positions=model.max_positions,
        discriminative_codes=0 if model.kind == "vq" else codes,
        vq_codes=0 if model.kind == "prior" else VQ_CODES,
        classes=CLASSES if model.class_conditional else 0,
    )


def discriminative_codes(recipe: Recipe) -> int:
    """Codes of the token shards that a recipe names: ``..._8k`` or ``..._16k``."""
    return int(re.search(r"_(\d+)k/", recipe.data.shards)[1]) * 1024


def operations(recipe: Recipe) -> float:
    """Floating-point operations of one training image."""
    return flops_per_image(recipe_spec(recipe, discriminative_codes(recipe)))


def time_line(path: Path) -> str:
    """The line of a recipe's header."""
    recipe = load_recipe(path)
    measured = MEASURED.get(recipe.model.width, MEASURED[1024])
    mfu = measured.images_per_second * operations(load_recipe(RECIPES / f"{measured.recipe}.yaml")) / PEAK
    images = recipe.training.steps * recipe.training.global_batch
    hours = images * operations(recipe) / (PEAK * mfu) / 3600
    return (
        f"# Time: about {hours:.0f} H200-hours at {100 * mfu:.0f} % MFU, measured with {measured.recipe} "
        f"({measured.images_per_second:,.0f} images/s)."
    )


def main() -> None:
    """Rewrite the headers."""
    for path in sorted(RECIPES.glob("*.yaml")):
        text, count = re.subn(r"^# Time: .*$", time_line(path), path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{path}: has {count} lines '# Time: ...', expected one")
        path.write_text(text, encoding="utf-8")
        print(f"{path.name:40} {time_line(path)}")


if __name__ == "__main__":
    main()
