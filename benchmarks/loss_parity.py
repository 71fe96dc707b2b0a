"""Losses of one recipe at several layouts, beside those of the first: same weights, same images in the same order.

    python benchmarks/loss_parity.py --gpus 2                     # base, bf16, 300 steps of 2 x 64 images
    python benchmarks/loss_parity.py --gpus 2 --variants zero1 training.micro_batch=32 zero3_overlap
    python benchmarks/loss_parity.py --gpus 8 --size 3.7b --batch 8 --dropout 0 --slice 120 --folder runs \
        --variants zero3_overlap zero1,parallel.tensor=2,parallel.sequence=true

Variants are those of ``train_speed.py``; by default data parallel, ZeRO 3, and tensor parallel with sequence
parallelism. All have ``--gpus`` x ``--batch`` images a step in micro-batches of ``--batch``, so that dropout masks are
equal too, and a warm-up of a third of the steps. Tokens are a Markov chain that a model learns from the first step on.

For each layout: the largest and the mean relative difference of a step's loss, the largest of the mean over 20 steps,
and whether the images were the same. Layouts that only round elsewhere (``training.micro_batch=32 model.dropout=0``)
show how much of a difference is rounding.

``--json`` is written anew every few seconds, so that it holds what there is when the time is over. With ``--folder``
runs stay there and the same call goes on with them. With ``--slice`` one rank is sent SIGUSR1 after so many seconds
of steps: the run saves, leaves with 75 and is started again from its checkpoint, until it has all its steps.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml
from ranks import ROOT, Ranks
from train_speed import GRID, SIZES, logged, recipe_of, run_name, write_shards

SMOOTHED = 20
VARIANTS = ["zero1", "zero3_overlap", "zero1,parallel.tensor=2,parallel.sequence=true"]
STOPPED = 75


def chain(codes: int, images: int) -> np.ndarray:
    """Tokens [N, T] in which a code has four likely successors, and frequent codes are more frequent (Zipf)."""
    generator = np.random.default_rng(0)
    frequency = 1 / np.arange(1, codes + 1)
    frequency /= frequency.sum()
    successors = generator.choice(codes, (codes, 4), p=frequency)
    tokens = generator.choice(codes, (images, GRID * GRID), p=frequency)
    for at in range(1, GRID * GRID):
        follows = generator.random(images) < 0.8
        next_codes = successors[tokens[:, at - 1], generator.integers(0, 4, images)]
        tokens[:, at] = np.where(follows, next_codes, tokens[:, at])
    return tokens


class Results:
    """What is known of every layout, in a JSON file."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path, self.layouts, self.restarts = path, {}, Counter()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        names = ("size", "gpus", "steps", "batch", "dropout")
        self.facts = {"device": device, "torch": torch.__version__} | {name: getattr(options, name) for name in names}

    def note(self, variant: str, run: Path, state: str) -> dict:
        """Read the metrics of a run and write the file."""
        lines = {line["step"]: line for line in logged(run) if line.get("loss") is not None}
        found = {"state": state, "restarts": self.restarts[variant], "steps": len(lines)}
        found["losses"] = [line["loss"] for line in lines.values()]
        if lines:
            last = lines[max(lines)]
            speeds = [line["images_per_second"] for line in lines.values()]
            found |= {
                "images_per_second": float(np.median(speeds)),
                "mfu": last["mfu"],
                "memory_gib": last["memory_gib"],
            }
        found["hashes"] = {step: line["sample_ids_hash"] for step, line in lines.items()}
        first = next(iter(self.layouts.values()), None)
        if first is not None and first is not self.layouts.get(variant):
            found |= compare(first, found)
        self.layouts[variant] = found
        shown = {
            name: {key: value for key, value in layout.items() if key != "hashes"}
            for name, layout in self.layouts.items()
        }
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text(json.dumps(self.facts | {"layouts": shown}, indent=1))
        temporary.replace(self.path)
        return found


def compare(first: dict, other: dict) -> dict:
    """Differences of ``other`` from ``first``, relative to it, over the steps that both have."""
    count = min(first["steps"], other["steps"])
    if not count:
        return {}
    expected, found = (np.array(layout["losses"][:count]) for layout in (first, other))
    step = np.abs(found / expected - 1)
    window = np.ones(min(SMOOTHED, count)) / min(SMOOTHED, count)
    smooth = np.abs(np.convolve(found, window, "valid") / np.convolve(expected, window, "valid") - 1)
    both = first["hashes"].keys() & other["hashes"].keys()
    return {
        "compared_steps": count,
        "largest_step_difference": float(step.max()),
        "mean_step_difference": float(step.mean()),
        "largest_smoothed_difference": float(smooth.max()),
        "first_step_difference": float(step[0]),
        "same_images": all(first["hashes"][at] == other["hashes"][at] for at in both),
    }


def train(variant: str, recipe: dict, folder: Path, results: Results, options: argparse.Namespace, end: float) -> str:
    """Train to the last step or to ``end``; how that went."""
    run = Path(recipe["run"])
    path = folder / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    while True:
        begun, stop_at = results.note(variant, run, "starting")["steps"], None
        if begun == options.steps:
            return "done"
        with Ranks(["train", path], options.gpus, folder / "logs" / run.name) as ranks:
            while None in ranks.wait(2.0):
                steps, now = results.note(variant, run, "training")["steps"], time.monotonic()
                if now > end:
                    return "out of time"
                if stop_at is None and steps > begun:
                    stop_at = now + options.slice
                elif stop_at is not None and now > stop_at:
                    os.kill(ranks.processes[-1].pid, signal.SIGUSR1)
                    stop_at = float("inf")
            statuses = ranks.statuses()
            if not any(statuses):
                return "done"
            if set(statuses) != {STOPPED}:
                print(f"{variant}: ended with {statuses}:\n{ranks.tail()}", flush=True)
                return f"failed, {statuses}"
        results.restarts[variant] += 1
        print(f"{variant}: saved step {results.note(variant, run, 'stopped')['steps']}, goes on", flush=True)


def report(variant: str, layout: dict) -> str:
    """One line."""
    text = f"{variant:44} {layout['state']}, {layout['steps']} steps"
    if layout["steps"]:
        text += f", loss {layout['losses'][0]:.4f} to {layout['losses'][-1]:.4f}, "
        text += f"{layout['images_per_second']:.0f} images/s, {layout['memory_gib']:.1f} GiB"
    if layout["restarts"]:
        text += f", {layout['restarts']} restarts"
    if "compared_steps" in layout:
        text += (
            f"\n{'':44} of the first: {layout['largest_step_difference']:.2e} at most, mean "
            f"{layout['mean_step_difference']:.2e}, smoothed {layout['largest_smoothed_difference']:.2e} at most; "
            f"{'the same' if layout['same_images'] else 'OTHER'} images"
        )
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--gpus", type=int, default=2, help="processes, one a GPU; on CPUs without one")
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, help="the first is what the others are compared with"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="images of a micro-batch; a step has one a GPU")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--json", type=Path, default=Path("loss_parity.json"), help="results")
    parser.add_argument("--folder", type=Path, help="keep runs here and go on with those that are here")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds of the whole call")
    parser.add_argument(
        "--slice", type=float, default=float("inf"), help="seconds of training after which a run is stopped and resumed"
    )
    options = parser.parse_args()
    end = time.monotonic() + options.time_limit
    sys.path.insert(0, str(ROOT))
    results = Results(options.json, options)
    codes = SIZES[options.size][3]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shards = folder / f"chain-{codes}"
        if not (shards / "manifest.json").exists():
            shutil.rmtree(shards, ignore_errors=True)
            write_shards(shards, codes, chain(codes, min(8192, options.steps * options.batch * options.gpus)))
        common = (
            f"training.steps={options.steps},training.global_batch={options.batch * options.gpus},monitor.log_every=1,"
            f"schedule.warmup_steps={options.steps // 3},checkpoint.keep_last=1,model.dropout={options.dropout}"
        )
        for variant in options.variants:
            run = folder / run_name(options.size, variant, options.gpus)
            recipe = recipe_of(run, shards, options.size, f"{common},{variant}", options.batch, options.gpus)
            state = train(variant, recipe, folder, results, options, end)
            results.note(variant, run, state)
            if state == "done":
                shutil.rmtree(run / "checkpoints", ignore_errors=True)  # of a large model tens of GB
            print(report(variant, results.layouts[variant]), flush=True)
            if state == "out of time":
                break
    sys.exit(0 if all(layout["state"] == "done" for layout in results.layouts.values()) else 1)


if __name__ == "__main__":
    main()
