"""Writes the figures of docs/scaling.md and docs/scaling.svg, from the predictions of ``digit-ds plan``.

python docs/draw_scaling.py
"""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from digit_ds.config import Recipe, load_recipe
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.estimate import memory_by_part, planned_shards, zero_of
from digit_ds.training.flops import flops_per_image
from digit_ds.training.plan import GPUS, Step, predicted_step
from digit_ds.training.runs import model_spec
from digit_ds.training.settings import PlanSettings
from digit_ds.training.traffic import data_traffic, norm_traffic, tensor_traffic

ROOT = Path(__file__).parents[1]
PAGE, PLOT = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.svg"
BEGIN, END = "<!-- drawn by docs/draw_scaling.py: {} -->\n", "<!-- end of the drawing -->\n"
CODES = {"base_prior": 8192, "large_prior": 16384, "prior_3.7b": 16384}
TITLES = {"base_prior": "base", "large_prior": "large", "prior_3.7b": "3.7B"}
LINKS = (25, 50, 400)
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)


class Layout(NamedTuple):
    """One way to train a shipped recipe; ``images`` a GPU and step."""

    recipe: str
    deepspeed: str
    tensor: int
    sequence: bool
    images: int
    micro_batch: int

    @property
    def title(self) -> str:
        """The name of the layout in the tables."""
        tensor = f", tensor {self.tensor}{' with sequence parallelism' * self.sequence}" if self.tensor > 1 else ""
        return f"{TITLES[self.recipe]}, `{self.deepspeed}`{tensor}"


class Measured(NamedTuple):
    """Images a second of all H100 of one host, from docs/training.md."""

    layout: Layout
    gpus: int
    images_per_second: float
    link: float | None = None
    """10^9 bytes a second between the GPUs where they do not use NVLink."""


MEASURED = (
    Measured(Layout("base_prior", "zero1", 1, False, 256, 256), 1, 1233),
    Measured(Layout("base_prior", "zero1", 1, False, 256, 256), 1, 1218),
    Measured(Layout("large_prior", "zero1", 1, False, 128, 128), 1, 399),
    Measured(Layout("large_prior", "zero1", 1, False, 128, 128), 1, 385),
    Measured(Layout("base_prior", "zero1", 1, False, 256, 256), 2, 2431),
    Measured(Layout("large_prior", "zero1", 1, False, 128, 128), 2, 779),
    Measured(Layout("large_prior", "zero2_overlap", 1, False, 128, 128), 2, 775),
    Measured(Layout("large_prior", "zero3_overlap", 1, False, 128, 128), 2, 732),
    Measured(Layout("large_prior", "zero1", 2, False, 64, 128), 2, 596),
    Measured(Layout("large_prior", "zero1", 2, True, 128, 256), 2, 692),
    Measured(Layout("prior_3.7b", "zero1", 2, True, 32, 64), 2, 152),
    Measured(Layout("large_prior", "zero1", 1, False, 128, 128), 2, 569, link=26),
    Measured(Layout("large_prior", "zero2_overlap", 1, False, 128, 128), 2, 735, link=26),
    Measured(Layout("large_prior", "zero2_overlap_bf16", 1, False, 128, 128), 2, 766, link=26),
)
LAYOUTS = (
    Layout("base_prior", "zero1", 1, False, 256, 256),
    Layout("base_prior", "zero2_overlap", 1, False, 256, 256),
    Layout("large_prior", "zero1", 1, False, 128, 128),
    Layout("large_prior", "zero2_overlap", 1, False, 128, 128),
    Layout("large_prior", "zero3_overlap", 1, False, 128, 128),
    Layout("large_prior", "zero1", 2, True, 64, 128),
    Layout("prior_3.7b", "zero2_overlap", 1, False, 32, 32),
    Layout("prior_3.7b", "zero2_overlap", 2, True, 32, 64),
    Layout("prior_3.7b", "zero3_overlap", 1, False, 32, 32),
)


def settings_of(layout: Layout, gpus: int, link: float, per_host: int) -> PlanSettings:
    """``digit-ds plan`` for these GPUs."""
    planned = {"images": 1_281_167, "grid": 16, "codes": CODES[layout.recipe]}
    where = {"gpus": gpus, "link": link, "per_host": per_host}
    return PlanSettings.read({"recipe": f"{layout.recipe}.yaml", **planned, **where})


@cache
def one_host(layout: Layout) -> Recipe:
    """The shipped recipe in this layout on eight GPUs."""
    overrides = {
        "deepspeed": f"{layout.deepspeed}.json",
        "parallel.tensor": layout.tensor,
        "parallel.sequence": str(layout.sequence).lower(),
        "training.global_batch": 8 * layout.images,
        "training.micro_batch": layout.micro_batch,
    }
    path = ROOT / "ds_configs" / f"{layout.recipe}.yaml"
    return load_recipe(path, [f"{key}={value}" for key, value in overrides.items()])


def recipe_of(layout: Layout, gpus: int) -> Recipe:
    """The shipped recipe in this layout on so many GPUs."""
    recipe = one_host(layout)
    training = recipe.training.model_copy(update={"global_batch": layout.images * gpus})
    return recipe.model_copy(update={"training": training})


@cache
def spec_of(layout: Layout) -> TransformerSpec:
    """The model over ImageNet's tokens."""
    recipe = one_host(layout)
    return model_spec(recipe, planned_shards(settings_of(layout, 8, 50, 8), recipe))


@cache
def step(layout: Layout, gpus: int, link: float, per_host: int = 8) -> Step:
    """The prediction."""
    return predicted_step(settings_of(layout, gpus, link, per_host), recipe_of(layout, gpus), spec_of(layout))


def predicted(row: Measured) -> float:
    """Images a second of a measured row; GPUs without NVLink are treated as separate hosts."""
    apart = row.link is not None
    made = step(row.layout, row.gpus, row.link or 50, per_host=1 if apart else 8)
    return row.layout.images * row.gpus / made.seconds


def efficiency(layout: Layout, gpus: int, link: float) -> float:
    """Share of a step in which a GPU computes what one GPU alone would compute."""
    made = step(layout, gpus, link)
    return made.computation / made.seconds


def mfu(layout: Layout, gpus: int, images_per_second: float) -> float:
    """Share of the GPUs' peak."""
    return images_per_second * flops_per_image(spec_of(layout)) / (gpus * GPUS["h100"].peak * 1e12)


def comparison() -> Iterator[str]:
    """Predictions compared with measurements."""
    yield "| | GPUs | link, GB/s | measured images/s | predicted | error |\n| --- | --- | --- | --- | --- | --- |\n"
    for row in MEASURED:
        made, link = predicted(row), "" if row.gpus == 1 else f"{row.link or GPUS['h100'].link:.0f}"
        error = round(made / row.images_per_second - 1, 3) + 0.0  # no negative zero
        yield f"| {row.layout.title} | {row.gpus} | {link} | {row.images_per_second:,} | {made:,.0f} | {error:+.1%} |\n"
    errors = [abs(predicted(row) / row.images_per_second - 1) for row in MEASURED]
    yield f"\nMean absolute error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}.\n"


def efficiencies() -> Iterator[str]:
    """Of every layout, link and number of GPUs."""
    yield f"| | images a GPU | GB/s | {' | '.join(map(str, COUNTS))} |\n|{' --- |' * (3 + len(COUNTS))}\n"
    for layout in LAYOUTS:
        for link in LINKS:
            figures = " | ".join(f"{efficiency(layout, gpus, link):.1%}" for gpus in COUNTS)
            yield f"| {layout.title} | {layout.images} | {link} | {figures} |\n"


def sent(gpus: int = 64) -> Iterator[str]:
    """Collectives of a rank in a step, and bytes that it sends if they use rings."""
    yield "| | micro-batch | tensor: messages | GB sent | data: messages | GB sent | of them gathers of weights |\n"
    yield "|" + " --- |" * 7 + "\n"
    for layout in LAYOUTS:
        recipe, spec = recipe_of(layout, gpus), spec_of(layout)
        data_size = gpus // layout.tensor
        micro_batches = layout.images * layout.tensor // layout.micro_batch
        data = data_traffic(recipe, spec, data_size, micro_batches)
        tensor = [*tensor_traffic(recipe, spec) * micro_batches, *norm_traffic(recipe)]
        cells = []
        for traffic, ranks in ((tensor, layout.tensor), (data, data_size)):
            cells += [
                f"{sum(part.count for part in traffic)}",
                f"{sum(part.sent(ranks) for part in traffic) / 1e9:.2f}",
            ]
        gathers = sum(part.count for part in data if part.operation == "all_gather")
        yield f"| {layout.title} | {layout.micro_batch} | {' | '.join(cells)} | {gathers} |\n"


def parts(gpus: int = 64, link: float = 50) -> Iterator[str]:
    """Where a step goes, milliseconds."""
    yield "| | computation | computed on all tensor ranks | tensor, exposed | data, exposed | computation slowed |"
    yield " ZeRO 3 | step | hidden collectives | images/s | MFU | GiB |\n|" + " --- |" * 12 + "\n"
    for layout in LAYOUTS:
        made, recipe, spec = step(layout, gpus, link), recipe_of(layout, gpus), spec_of(layout)
        shown = (
            made.computation,
            made.repeated,
            made.tensor,
            made.data,
            made.beside,
            made.own,
            made.seconds,
            made.hidden,
        )
        rate = layout.images * gpus / made.seconds
        memory = sum(memory_by_part(recipe, spec, gpus // layout.tensor, *zero_of(recipe)).values())
        figures = " | ".join(f"{seconds * 1e3:.1f}" for seconds in shown)
        yield f"| {layout.title} | {figures} | {rate:,.0f} | {mfu(layout, gpus, rate):.1%} | {memory:.1f} |\n"


def own_batch() -> Iterator[str]:
    """The recipes' own batch of 1,024 images on an increasing number of GPUs."""
    counts = [gpus for gpus in COUNTS if gpus <= 256]
    yield f"| images/s (MFU) | {' | '.join(map(str, counts))} |\n|{' --- |' * (1 + len(counts))}\n"
    for layout in LAYOUTS:
        if layout.deepspeed != "zero2_overlap" or layout.tensor > 1:
            continue
        cells = []
        for gpus in counts:
            images = 1024 // gpus
            made = layout._replace(images=images, micro_batch=min(images, layout.micro_batch))
            seconds = step(made, gpus, 50).seconds
            cells.append(f"{1024 / seconds:,.0f} ({mfu(layout, gpus, 1024 / seconds):.1%})")
        yield f"| {layout.title} | {' | '.join(cells)} |\n"


TABLES = {"sent": sent, "comparison": comparison, "efficiency": efficiencies, "parts": parts, "own batch": own_batch}


def page() -> str:
    """The whole page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        before, mark, rest = text.partition(BEGIN.format(name))
        text = f"{before}{mark}\n{''.join(table())}\n{END}{rest.partition(END)[2]}"
    return text


WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 220, 46, 34, 40
LOWEST = 0.4
"""Efficiency at the foot of the plot."""
LINES = {25: 'stroke="#c62828" stroke-width="1.6"', 50: 'stroke="#283593" stroke-width="1.6"'}
LINES[400] = 'stroke="#81c784" stroke-width="5"'  # under the one for 50, with which it mostly coincides
CHOSEN = {"base_prior": "zero1", "large_prior": "zero3_overlap", "prior_3.7b": "zero3_overlap"}


def plot() -> str:
    """Efficiency over the number of GPUs, a panel for each model: ``zero2_overlap`` solid, another one dashed."""

    def point(panel: int, gpus: int, share: float) -> str:
        x = LEFT + panel * (WIDTH + GAP) + WIDTH * math.log2(gpus / COUNTS[0]) / math.log2(COUNTS[-1] / COUNTS[0])
        return f"{x:.1f},{height(share):.1f}"

    def height(share: float) -> float:
        return TOP + HEIGHT * (1 - share) / (1 - LOWEST)

    whole = LEFT + 3 * WIDTH + 2 * GAP + 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {TOP + HEIGHT + 64}" font-family="sans-serif"'
        ' font-size="11">',
        f'<rect width="{whole}" height="{TOP + HEIGHT + 64}" fill="#ffffff"/>',
    ]
    for panel, recipe in enumerate(TITLES):
        left = LEFT + panel * (WIDTH + GAP)
        out.append(f'<text x="{left}" y="{TOP - 12}" font-size="11">{TITLES[recipe]}: zero2_overlap solid, '
                   f'{CHOSEN[recipe]} dashed</text>')  # fmt: skip
        for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1):
            y = height(share)
            out.append(f'<path d="M{left} {y:.1f} h{WIDTH}" stroke="#dddddd"/>')
            out.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        for gpus in COUNTS:
            x = point(panel, gpus, 0).split(",")[0]
            out.append(f'<text x="{x}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{gpus}</text>')
        for layout in LAYOUTS:
            if (
                layout.recipe != recipe
                or layout.tensor > 1
                or layout.deepspeed not in ("zero2_overlap", CHOSEN[recipe])
            ):
                continue
            dashed = "" if layout.deepspeed == "zero2_overlap" else ' stroke-dasharray="5 3"'
            for link in reversed(LINKS):
                points = " ".join(point(panel, gpus, efficiency(layout, gpus, link)) for gpus in COUNTS)
                out.append(f'<polyline points="{points}" fill="none" {LINES[link]}{dashed}/>')
    for number, link in enumerate(LINKS):
        x = LEFT + number * 150
        out.append(f'<path d="M{x} {TOP + HEIGHT + 40} h26" {LINES[link]}/>')
        out.append(f'<text x="{x + 32}" y="{TOP + HEIGHT + 44}">{link} GB/s a GPU</text>')
    out.append(f'<text x="{whole - 24}" y="{TOP + HEIGHT + 44}" text-anchor="end">GPUs, 8 a host</text>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    PLOT.write_text(plot(), encoding="utf-8")
