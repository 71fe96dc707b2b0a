"""The hours in the headers of ``ds_configs/*.yaml``, from measured training speed.

    python benchmarks/recipe_hours.py       # rewrites the lines "# Time: about ..."

A recipe takes ``images x operations an image / (peak x MFU)``, with the MFU measured on the recipe itself, or else on a
model of its width. A new figure goes into MEASURED (and into docs/results.md), nowhere else.
"""

import re
from pathlib import Path
from typing import NamedTuple

from digit_ds.config import Recipe, load_recipe
from digit_ds.data.shards import ShardManifest
from digit_ds.training.flops import flops_per_image
from digit_ds.training.runs import model_spec

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


def discriminative_codes(recipe: Recipe) -> int:
    """Codes of the token shards that a recipe names: ``..._8k`` or ``..._16k``."""
    return int(re.search(r"_(\d+)k/", recipe.data.shards)[1]) * 1024


def operations(recipe: Recipe) -> float:
    """Floating-point operations of one training image: 16 x 16 tokens of ImageNet."""
    manifest = ShardManifest(
        images=IMAGES,
        views=1,
        classes=[str(number) for number in range(CLASSES)],
        grid=[16, 16],
        image_size=256,
        discriminative_codes=discriminative_codes(recipe),
        vq_codes=VQ_CODES,
        crops="random",
        provenance={},
        skipped=0,
        index_sha256="",
    )
    return flops_per_image(model_spec(recipe, manifest))


def time_line(path: Path) -> str:
    """The line of a recipe's header."""
    recipe = load_recipe(path)
    models = {measured: load_recipe(RECIPES / f"{measured.recipe}.yaml") for measured in MEASURED}
    own = [measured for measured in MEASURED if measured.recipe == path.stem]
    alike = [measured for measured, model in models.items() if model.model.width == recipe.model.width]
    measured = (own + alike)[0]
    mfu = measured.images_per_second * operations(models[measured]) / PEAK
    images = recipe.training.steps * recipe.training.global_batch
    hours = images * operations(recipe) / (PEAK * mfu) / 3600
    return (
        f"# Time: about {hours:.0f} {measured.gpu}-hours at {100 * mfu:.0f} % MFU, measured with {measured.recipe} "
        f"({measured.images_per_second:,.0f} images/s)."
    )


def main() -> None:
    """Rewrite the headers that state hours."""
    for path in sorted(RECIPES.glob("*.yaml")):
        text, count = re.subn(
            r"^# Time: about .*$", time_line(path), path.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        if count:
            path.write_text(text, encoding="utf-8")
            print(f"{path.name:40} {time_line(path)}")


if __name__ == "__main__":
    main()
