"""The paper's tables in small: prior with AR decoder, prior with NAR decoder and the VQ baseline, over several seeds.

python -m digit_ds.demo.table OUT [--seeds 0 1 2] [--jobs N] [--prepare] [--small]

Pictures, stand-ins, codebook and token shards are made once; a seed changes initial weights, order of the data, drawn
tokens and the probe's order. Each step is a process with one thread, up to ``--jobs`` of them run side by side, and
finished ones are not repeated. OUT may be made on one machine (``--prepare``) and finished on another.
Writes OUT/table.json and OUT/table.md: mean and standard deviation over the seeds.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.svm import SVC

from digit_ds.config import load_recipe
from digit_ds.demo.digits import read_images, read_labels
from digit_ds.demo.judge import as_originals, train_judge
from digit_ds.demo.report import read_job
from digit_ds.demo.stages import FULL, SMALL, Scale, Stages
from digit_ds.demo.steps import Step, claim, run_steps
from digit_ds.errors import UserError, run_command
from digit_ds.files import read_json, write_atomically, write_json
from digit_ds.model.released import read_config
from digit_ds.model.weights import parameter_count

MODELS = {
    "prior": "prior over discriminative tokens",
    "vq_baseline": "VQ baseline",
    "pixel_ar": "AR decoder",
    "pixel_nar": "NAR decoder",
}
"""Recipes of this folder, which are the models of one seed, and what the table calls them."""
PROBED = ("prior", "vq_baseline")
LEARNING_RATE = 4e-3
"""Of both first-stage models, the better of two for each: nats of a held-out token (seed 1) were 2.270 at 2e-3 and
2.206 at 4e-3 for the prior, 2.148 and 2.076 for the baseline."""
TEMPERATURE = 0.9
"""Of the first stage, in every row, as in the demo."""


@dataclass(frozen=True)
class Row:
    """Pictures of the table and who makes them."""

    name: str
    prior: str | None
    """Writes the first stage; None: held-out pictures are rebuilt from their discriminative tokens."""
    pixels: str | None
    """The pixel decoder; None after the VQ baseline."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""

    @property
    def models(self) -> list[str]:
        """Everything that is trained for this row."""
        return [model for model in (self.prior, self.pixels) if model is not None]

    @property
    def title(self) -> str:
        """What the table calls it."""
        names = " + ".join(MODELS[model] for model in self.models)
        return names if self.prior else f"held-out digits, rebuilt by the {names}"


ROWS = (
    Row("prior_ar-guided", "prior", "pixel_ar", 2.5),
    Row("prior_ar-unguided", "prior", "pixel_ar"),
    Row("prior_nar-guided", "prior", "pixel_nar", 2.5),
    Row("prior_nar-unguided", "prior", "pixel_nar"),
    Row("vq-guided", "vq_baseline", None, 2.5),
    Row("vq-unguided", "vq_baseline", None),
    Row("rebuilt_ar", None, "pixel_ar"),
    Row("rebuilt_nar", None, "pixel_nar"),
)


def steps(out: Path, scale: Scale, seeds: list[int]) -> list[Step]:
    """All steps; trainings first, because they take longest."""
    stages = Stages(out, scale)
    trainings, rest = [], []
    for seed in seeds:
        for model in MODELS:
            name, run = f"{model}-{seed}", out / "runs" / f"{model}-{seed}"
            changed = [f"training.seed={seed}", f"data.shuffle_seed={seed}"]
            if model in PROBED:
                changed.append(f"optimizer.learning_rate={LEARNING_RATE}")
            trainings.append(stages.train(name, model, run, *changed))
            rest.append(stages.verb(f"export-{name}", "export", run, out / "models" / name, needs=(name,)))
        for row in ROWS:
            rest += _row_steps(stages, row, seed)
        for model in PROBED:
            name = f"{model}-{seed}"
            words = (out / "models" / name, out / "probes" / name, "--seed", seed)
            rest.append(stages.probe(f"probe-{name}", *words, needs=(f"export-{name}",)))
    real = stages.evaluate("evaluate-real", stages.held_out_images, out / "scores" / "real.json", needs=("judge",))
    return [*stages.shared(), *trainings, *rest, real]


def _row_steps(stages: Stages, row: Row, seed: int) -> list[Step]:
    """Pictures of a row and their scores."""
    out, name = stages.out, f"{row.name}-{seed}"
    samples, models = out / "samples" / name, out / "models"
    needs = tuple(f"export-{model}-{seed}" for model in row.models)
    words: list[object] = []
    if row.pixels:
        words += ["--decoder", models / f"{row.pixels}-{seed}"]
    if row.pixels == "pixel_ar":
        words += ["--decoder-top-p", 0.8]
    if row.prior:
        words = ["--prior", models / f"{row.prior}-{seed}", *words, "--temperature", TEMPERATURE]
        words += ["--guidance", row.guidance, "--seed", seed]
        drawn = stages.sample(f"sample-{name}", samples, *words, needs=needs)
    else:
        drawn = stages.rebuild(f"sample-{name}", samples, *words, "--seed", seed, needs=needs)
    scores = out / "scores" / f"{name}.json"
    return [drawn, stages.evaluate(f"evaluate-{name}", samples / "images", scores, needs=(drawn.name, "judge"))]


def make_table(out: Path | str, seeds: list[int], jobs: int, small: bool = False, prepare: bool = False) -> None:
    """Do the steps that ``out`` lacks, then write the table.

    Args:
        out: folder for everything; new, or that of an earlier run of the same size.
        seeds: at least one; more may be added later.
        jobs: steps that run side by side.
        small: the demo's small size, to see that it runs.
        prepare: stop before the first training.

    Raises:
        UserError: ``out`` holds something else, or a step failed.
    """
    out = Path(out).resolve()
    if jobs < 1 or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"jobs is {jobs}, seeds are {seeds}, expected at least one job and different seeds from 0 on")
    with claim(out, "settings.json", {"table": True, "small": small}):
        scale = SMALL if small else FULL
        if prepare:
            run_steps(Stages(out, scale).shared(), jobs)
            print(f"{out}: prepared; the same command without --prepare goes on from here, on any machine")
            return
        run_steps(steps(out, scale, seeds), jobs)
        table = measure(out, scale, seeds)
        write_json(out / "table.json", table)
        text = as_markdown(table)
        write_atomically(out / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
        print(f"\n{text}\n{out / 'table.json'}")


def measure(out: Path, scale: Scale, seeds: list[int]) -> dict[str, Any]:
    """Everything in table.json, from what the steps left in ``out``."""
    stages = Stages(out, scale)
    judge = train_judge(read_images(stages.train_images), read_labels(stages.train_images))
    real = read_json(out / "scores" / "real.json")
    held_out = as_originals(read_images(stages.held_out_images))
    return {
        "seeds": seeds,
        "samples_per_seed": 10 * scale.per_class,
        "temperature": TEMPERATURE,
        "models": {model: _described(out, model, seeds) for model in MODELS},
        "rows": {row.name: _over_seeds(seeds, partial(_row, out, row.name, judge)) for row in ROWS},
        "probe": {model: _over_seeds(seeds, partial(_probe, out, model)) for model in PROBED},
        "real_held_out": {
            "class_accuracy": judge.score(held_out, read_labels(stages.held_out_images)),
            "fid": real["fid"],
            "samples": real["samples"],
        },
    }


def _described(out: Path, model: str, seeds: list[int]) -> dict[str, Any]:
    """Size and training of one model."""
    runs = [out / "runs" / f"{model}-{seed}" for seed in seeds]
    recipe = load_recipe(runs[0] / "recipe.yaml")
    spec, _, _ = read_config(out / "models" / runs[0].name)
    return {
        "parameters": parameter_count(spec),
        "layers": spec.layers,
        "width": spec.width,
        "steps": recipe.training.steps,
        "images_a_step": recipe.training.global_batch,
        "learning_rate": recipe.optimizer.learning_rate,
    }


def _row(out: Path, row: str, judge: SVC, seed: int) -> dict[str, float]:
    """Figures of one row and seed."""
    pictures, labels = read_job(out / "samples" / f"{row}-{seed}")
    scores = read_json(out / "scores" / f"{row}-{seed}.json")
    named = judge.predict(as_originals(pictures))
    return {
        "class_accuracy": float(np.mean(named == labels)),
        "fid": scores["fid"],
        "inception_score": scores["inception_score"],
    }


def _probe(out: Path, model: str, seed: int) -> dict[str, float]:
    """The best layer's accuracy of one probe."""
    found = read_json(out / "probes" / f"{model}-{seed}" / "probe.json")
    return {"accuracy": found["best_accuracy"], "layer": found["best_layer"]}


def _over_seeds(seeds: list[int], figures: Callable[[int], dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Each figure's values, mean and sample standard deviation (None for one seed)."""
    found = [figures(seed) for seed in seeds]
    columns = {name: [values[name] for values in found] for name in found[0]}
    return {
        name: {
            "values": values,
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name, values in columns.items()
    }


def as_markdown(table: dict[str, Any]) -> str:
    """The table as Markdown: a line for each row, and what the figures are of."""

    def shown(figure: dict[str, Any], digits: int, factor: float = 1.0) -> str:
        spread = "" if figure["std"] is None else f" ± {figure['std'] * factor:.{digits}f}"
        return f"{figure['mean'] * factor:.{digits}f}{spread}"

    models, real = table["models"], table["real_held_out"]
    lines = [
        "| pictures written by | guidance | class accuracy, % | FID, digit features | probe, top-1 % |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        found, scale = table["rows"][row.name], "none" if row.guidance == 1 else f"{row.guidance:g}"
        probe = shown(table["probe"][row.prior]["accuracy"], 1, 100) if row.prior else ""
        figures = (shown(found["class_accuracy"], 1, 100), shown(found["fid"], 1), probe)
        lines.append(f"| {row.title} | {scale if row.prior else ''} | {' | '.join(figures)} |")
    lines += [
        f"| real held-out digits | | {real['class_accuracy'] * 100:.1f} | {real['fid']:.1f} | |",
        "",
        f"Seeds {', '.join(map(str, table['seeds']))}: mean ± standard deviation; {table['samples_per_seed']} pictures "
        f"drawn for a row and seed ({real['samples']} held out), temperature {table['temperature']:g}.",
        "",
        "| model | parameters | layers x width | steps x images | learning rate |",
        "|---|---|---|---|---|",
    ]
    for model, name in MODELS.items():
        found = models[model]
        lines.append(
            f"| {name} | {found['parameters']:,} | {found['layers']} x {found['width']} | "
            f"{found['steps']} x {found['images_a_step']} | {found['learning_rate']:g} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Parse the command line and make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="steps side by side, one thread each")
    parser.add_argument("--prepare", action="store_true", help="only what all models share")
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(arguments)
    make_table(options.out, options.seeds, options.jobs, options.small, options.prepare)


if __name__ == "__main__":
    run_command(main)
