"""Prior and pixel decoders beside a VQ baseline, and random beside raster order, in small and over several seeds.

python -m digit_ds.demo.table OUT [--seeds 0 1 2] [--jobs N] [--prepare] [--small]

The priors (raster order; random order that is annealed to raster) and the VQ baseline have equal layers, width, steps
and images. Pictures, stand-ins, codebook and token shards are made once; a seed changes initial weights, order of the
data, drawn tokens and the probe's order. The learning rate of each model and the guidance scale of each first stage are
chosen with a seed of their own (``SEARCH_SEED``), which is not reported.

Each step is a process with one thread, up to ``--jobs`` of them run side by side, on one GPU where there is one.
Finished steps are not repeated, and a stopped training (Ctrl-C, SIGTERM) continues. OUT may be made on one machine
(``--prepare``) and finished on another. Writes OUT/table.json and OUT/table.md: mean and standard deviation over the
seeds.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from digit_ds.config import load_recipe
from digit_ds.data.feature_network import load_feature_network
from digit_ds.demo.digits import read_images, read_labels
from digit_ds.demo.stages import FULL, SMALL, Scale, Stages
from digit_ds.demo.steps import Step, claim, run_steps
from digit_ds.errors import UserError, run_command
from digit_ds.files import read_json, write_atomically, write_json
from digit_ds.model.released import read_config
from digit_ds.model.weights import parameter_count

MODELS = {
    "prior": "prior over discriminative tokens",
    "random_prior": "prior over discriminative tokens, random order",
    "vq_baseline": "VQ baseline",
    "pixel_ar": "AR decoder",
    "pixel_nar": "NAR decoder",
}
"""The models of one seed, and what the table calls them. The recipes of this folder have their names, but for the
random prior's, which is the prior's."""
FIRST_STAGE = ("prior", "random_prior", "vq_baseline")
SEARCH_SEED = 1000
"""Learning rates and guidance scales are chosen with it; its models are not reported."""
TEMPERATURE = 0.9
"""Of the first stage, in every row."""
SCALES = (1.5, 2.5, 4.0)
"""Constant guidance scales that are tried; the one of the lowest FID against held-out digits is taken."""


@dataclass(frozen=True)
class Budget:
    """What every model is given."""

    steps: int
    images: int
    """Of one step."""
    learning_rates: tuple[str, ...]
    """Tried for each model; the one of the lowest held-out nats is taken."""
    per_class: int
    """Pictures of each class in a row and seed."""

    def overrides(self, model: str, rate: str, seed: int) -> list[str]:
        """Overrides of the model's recipe."""
        made = [
            *("model.layers=4", "model.width=128", "model.heads=4", "model.max_positions=64"),
            *(f"training.steps={self.steps}", f"training.global_batch={self.images}"),
            *(f"training.micro_batch={self.images}", f"schedule.warmup_steps={self.steps // 20}"),
            *(f"monitor.validate_every={self.steps}", f"checkpoint.every={self.steps}"),
            *(f"optimizer.learning_rate={rate}", f"training.seed={seed}", f"data.shuffle_seed={seed}"),
        ]
        if model == "random_prior":  # RAR anneals from half to three quarters of the run
            anneal = f"[{self.steps // 2},{3 * self.steps // 4}]"
            made += ["training.order=random", f"training.order_anneal={anneal}"]
        return made


FULL_BUDGET = Budget(1500, 128, ("1e-3", "2e-3", "4e-3"), 100)
SMALL_BUDGET = Budget(40, 32, ("4e-3",), 2)


@dataclass(frozen=True)
class Row:
    """Pictures of the table and who makes them."""

    name: str
    prior: str | None
    """Writes the first stage; None: held-out pictures are rebuilt from their discriminative tokens."""
    pixels: str | None
    """The pixel decoder; None after the VQ baseline."""
    guided: bool = False

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
    Row("prior_ar-guided", "prior", "pixel_ar", True),
    Row("prior_ar-unguided", "prior", "pixel_ar"),
    Row("random_prior_ar-guided", "random_prior", "pixel_ar", True),
    Row("random_prior_ar-unguided", "random_prior", "pixel_ar"),
    Row("prior_nar-guided", "prior", "pixel_nar", True),
    Row("prior_nar-unguided", "prior", "pixel_nar"),
    Row("vq-guided", "vq_baseline", None, True),
    Row("vq-unguided", "vq_baseline", None),
    Row("rebuilt_ar", None, "pixel_ar"),
    Row("rebuilt_nar", None, "pixel_nar"),
)


class Study:
    """Makes the steps of one folder of results.

    Args:
        out: the folder, absolute.
        small: a few steps of everything.
    """

    def __init__(self, out: Path, small: bool = False):
        scale: Scale = SMALL if small else FULL
        self.out, self.budget = out, SMALL_BUDGET if small else FULL_BUDGET
        self.stages = Stages(out, scale)

    def search(self) -> list[Step]:
        """A training of each model at each learning rate."""
        return [
            self._train(f"search-{model}-{rate}", model, rate, SEARCH_SEED)
            for model in MODELS
            for rate in self.budget.learning_rates
        ]

    def rates(self) -> dict[str, str]:
        """The best learning rate of each model, from the searches."""
        found = {}
        for model in MODELS:
            nats = {rate: held_out_nats(self._run(f"search-{model}-{rate}")) for rate in self.budget.learning_rates}
            found[model] = min(nats, key=nats.__getitem__)
        return found

    def train(self, rates: dict[str, str], seeds: list[int]) -> list[Step]:
        """All models of all seeds; and the guidance of each first stage, from the models of the search."""
        made = [self._train(f"{model}-{seed}", model, rates[model], seed) for seed in seeds for model in MODELS]
        for seed in seeds:
            made += [self._export(f"{model}-{seed}") for model in MODELS]
        chosen = {model: f"search-{model}-{rate}" for model, rate in rates.items() if model != "pixel_nar"}
        made += [self._export(name) for name in chosen.values()]
        return made + [self._guidance(model, chosen) for model in FIRST_STAGE]

    def scales(self) -> dict[str, float]:
        """The best guidance scale of each first stage."""
        return {
            model: read_json(self._guidance_folder(model) / "guidance.json")["best"]["scale"] for model in FIRST_STAGE
        }

    def score(self, scales: dict[str, float], seeds: list[int]) -> list[Step]:
        """Pictures of every row, their scores, and the probes."""
        made = []
        for seed in seeds:
            for row in ROWS:
                made += self._row(row, seed, scales)
            for model in FIRST_STAGE:
                name = f"{model}-{seed}"
                words = (self._model(name), self.out / "probes" / name, "--seed", seed)
                made.append(self.stages.probe(f"probe-{name}", *words, needs=()))
        return [*made, self._evaluate("real", self.stages.held_out_images, needs=())]

    def _run(self, name: str) -> Path:
        return self.out / "runs" / name

    def _model(self, name: str) -> Path:
        return self.out / "models" / name

    def _guidance_folder(self, model: str) -> Path:
        return self.out / "guidance" / model

    def _train(self, name: str, model: str, rate: str, seed: int) -> Step:
        recipe = "prior" if model == "random_prior" else model
        return self.stages.train(name, recipe, self._run(name), *self.budget.overrides(model, rate, seed))

    def _export(self, name: str) -> Step:
        return self.stages.verb(f"export-{name}", "export", self._run(name), self._model(name), needs=(name,))

    def _drawing(self, prior: str, pixels: tuple[str, Path] | None, seed: int) -> list[object]:
        """Options of ``sample`` and ``guidance`` that draw from a first stage and perhaps a pixel decoder."""
        words: list[object] = ["--prior", self._model(prior), "--temperature", TEMPERATURE, "--seed", seed]
        return [*words, *self._decoding(*pixels)] if pixels else words

    def _decoding(self, kind: str, model: Path) -> list[object]:
        top_p = self.stages.scale.decoder_top_p
        return ["--decoder", model, *(["--decoder-top-p", top_p] if kind == "pixel_ar" else [])]

    def _guidance(self, model: str, chosen: dict[str, str]) -> Step:
        """The search for the scale, with the AR decoder."""
        needs = [f"export-{chosen[model]}"]
        pixels = None
        if model != "vq_baseline":
            needs.append(f"export-{chosen['pixel_ar']}")
            pixels = "pixel_ar", self._model(chosen["pixel_ar"])
        stages = self.stages
        words = (
            *(*self._drawing(chosen[model], pixels, SEARCH_SEED), *stages.painter, "--scales", *SCALES),
            *("--guidance-schedule", "constant", "--per-class", self.budget.per_class),
            *("--reference", stages.held_out_images, "--features", stages.judge),
        )
        return stages.verb(f"guidance-{model}", "guidance", *words, "--out", self._guidance_folder(model), needs=needs)

    def _row(self, row: Row, seed: int, scales: dict[str, float]) -> list[Step]:
        """Pictures of a row and their scores."""
        name, stages = f"{row.name}-{seed}", self.stages
        samples = self.out / "samples" / name
        pixels = (row.pixels, self._model(f"{row.pixels}-{seed}")) if row.pixels else None
        if row.prior:
            scale = scales[row.prior] if row.guided else 1.0
            words = [*self._drawing(f"{row.prior}-{seed}", pixels, seed), "--guidance", scale]
            words += [*stages.painter, "--out", samples, "--per-class", self.budget.per_class]
            drawn = stages.verb(f"sample-{name}", "sample", *words, needs=())
        else:
            assert pixels is not None
            drawn = stages.rebuild(f"sample-{name}", samples, *self._decoding(*pixels), "--seed", seed, needs=())
        judged = ("--classifier", stages.judge, "--labels", samples / "manifest.json")
        return [drawn, self._evaluate(name, samples, *judged, needs=(drawn.name,))]

    def _evaluate(self, name: str, pictures: Path, *words: object, needs: tuple[str, ...]) -> Step:
        """FID against the training images, with the features of the judge's network."""
        stages = self.stages
        words = ("--reference", stages.train_images, "--reference-name", "training digits", *words)
        out = self.out / "scores" / f"{name}.json"
        words = ("--generated", pictures, "--features", stages.judge, *words, "--out", out)
        return stages.verb(f"evaluate-{name}", "evaluate", *words, needs=needs)


def held_out_nats(run: Path) -> float:
    """The last mean over held-out tokens that a run's metrics hold; of a NAR decoder over the masked ones."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [record["validation_nll"] for line in lines if "validation_nll" in (record := json.loads(line))]
    if not found:
        raise UserError(f"{run / 'metrics.jsonl'}: holds no validation_nll, expected that of a complete run")
    return found[-1]


def make_table(out: Path | str, seeds: list[int], jobs: int, small: bool = False, prepare: bool = False) -> None:
    """Do the steps that ``out`` lacks, then write the table.

    Args:
        out: folder for everything; new, or that of an earlier run of the same size.
        seeds: at least one; more may be added later.
        jobs: steps that run side by side.
        small: a few steps of everything, to see that it runs.
        prepare: stop before the first training.

    Raises:
        UserError: ``out`` holds something else, or a step failed.
    """
    out = Path(out).resolve()
    if jobs < 1 or len({*seeds, SEARCH_SEED}) != len(seeds) + 1 or min(seeds) < 0:
        raise UserError(
            f"jobs is {jobs}, seeds are {seeds}, expected at least one job and different seeds from 0 on other than "
            f"{SEARCH_SEED}"
        )
    with claim(out, "settings.json", {"table": True, "small": small}):
        study = Study(out, small)
        shared = study.stages.shared()
        run_steps(shared, jobs)
        if prepare:
            print(f"{out}: prepared; the same command without --prepare continues from here, on any machine")
            return
        made = [*shared, *study.search()]
        run_steps(made, jobs)
        rates = study.rates()
        made += study.train(rates, seeds)
        run_steps(made, jobs)
        scales = study.scales()
        made += study.score(scales, seeds)
        run_steps(made, jobs)
        table = measure(study, rates, scales, seeds)
        write_json(out / "table.json", table)
        text = as_markdown(table)
        write_atomically(out / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
        print(f"\n{text}\n{out / 'table.json'}")


def measure(study: Study, rates: dict[str, str], scales: dict[str, float], seeds: list[int]) -> dict[str, Any]:
    """Everything in table.json, from what the steps left."""
    out, stages = study.out, study.stages
    judge = load_feature_network(stages.judge)
    held_out = (read_images(stages.held_out_images) * 255).round().byte()
    named = judge(held_out)[1].argmax(-1).numpy()
    real = read_json(out / "scores" / "real.json")
    searched = {
        model: {rate: held_out_nats(out / "runs" / f"search-{model}-{rate}") for rate in study.budget.learning_rates}
        for model in MODELS
    }
    return {
        "seeds": seeds,
        "search_seed": SEARCH_SEED,
        "samples_per_seed": 10 * study.budget.per_class,
        "temperature": TEMPERATURE,
        "guidance": scales,
        "reference_samples": real["reference_samples"],
        "models": {model: _described(out, model, seeds) | {"searched": searched[model]} for model in MODELS},
        "rows": {row.name: _over_seeds(seeds, partial(_row, out, row.name)) for row in ROWS},
        "probe": {model: _over_seeds(seeds, partial(_probe, out, model)) for model in FIRST_STAGE},
        "nats": {model: _over_seeds(seeds, partial(_nats, out, model)) for model in MODELS},
        "real_held_out": {
            "class_accuracy": float((named == read_labels(stages.held_out_images)).mean()),
            "fid": real["fid"],
            "samples": real["samples"],
        },
    }


def _described(out: Path, model: str, seeds: list[int]) -> dict[str, Any]:
    """Size and training of one model."""
    name = f"{model}-{seeds[0]}"
    recipe = load_recipe(out / "runs" / name / "recipe.yaml")
    spec, _, _ = read_config(out / "models" / name)
    return {
        "parameters": parameter_count(spec),
        "layers": spec.layers,
        "width": spec.width,
        "steps": recipe.training.steps,
        "images_a_step": recipe.training.global_batch,
        "learning_rate": recipe.optimizer.learning_rate,
    }


def _row(out: Path, row: str, seed: int) -> dict[str, float]:
    """Figures of one row and seed."""
    scores = read_json(out / "scores" / f"{row}-{seed}.json")
    return {name: scores[name] for name in ("class_accuracy", "fid", "inception_score")}


def _probe(out: Path, model: str, seed: int) -> dict[str, float]:
    """The best layer's accuracy of one probe."""
    found = read_json(out / "probes" / f"{model}-{seed}" / "probe.json")
    return {"accuracy": found["best_accuracy"], "layer": found["best_layer"]}


def _nats(out: Path, model: str, seed: int) -> dict[str, float]:
    """Held-out nats: of a token, and of all tokens of an image and its end (of a NAR decoder no likelihood)."""
    name = f"{model}-{seed}"
    nats = held_out_nats(out / "runs" / name)
    spec, _, _ = read_config(out / "models" / name)
    return {"token": nats} | ({} if spec.kind == "nar" else {"image": nats * (1 + spec.tokens)})


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
    lines = ["| pictures written by | guidance | class accuracy, % | FID, digit features |", "|---|---|---|---|"]
    for row in ROWS:
        found = table["rows"][row.name]
        scale = "" if not row.prior else f"{table['guidance'][row.prior]:g}" if row.guided else "none"
        figures = (shown(found["class_accuracy"], 1, 100), shown(found["fid"], 2))
        lines.append(f"| {row.title} | {scale} | {' | '.join(figures)} |")
    lines += [
        f"| real held-out digits | | {real['class_accuracy'] * 100:.1f} | {real['fid']:.2f} |",
        "",
        f"Seeds {', '.join(map(str, table['seeds']))}: mean ± standard deviation; {table['samples_per_seed']:,} "
        f"pictures drawn for a row and seed ({real['samples']:,} held out) against {table['reference_samples']:,} "
        f"training digits, temperature {table['temperature']:g}.",
        "",
        "| model | parameters | layers x width | steps x images | learning rate | probe, top-1 % | nats an image |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, name in MODELS.items():
        found, nats = models[model], table["nats"][model]
        probe = shown(table["probe"][model]["accuracy"], 1, 100) if model in table["probe"] else ""
        image = shown(nats["image"], 1) if "image" in nats else ""
        lines.append(
            f"| {name} | {found['parameters']:,} | {found['layers']} x {found['width']} | "
            f"{found['steps']:,} x {found['images_a_step']} | {found['learning_rate']:g} | {probe} | {image} |"
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
