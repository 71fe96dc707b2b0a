"""The demo's results: samples.png, report.json, report.html, and tb/ with pictures for TensorBoard.

python -m digit_ds.demo.report OUT [--set mnist]
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from digit_ds.data.images import open_image
from digit_ds.data.shards import iterate, read_manifest
from digit_ds.demo.digits import read_images, read_labels
from digit_ds.demo.judge import HIDDEN, Judge
from digit_ds.demo.page import write_page
from digit_ds.demo.picture_sets import SETS
from digit_ds.demo.pictures import labelled_grid
from digit_ds.demo.run import steps
from digit_ds.demo.stages import FULL
from digit_ds.errors import run_command
from digit_ds.files import read_json, write_atomically, write_json
from digit_ds.model.sequences import training_sequence
from digit_ds.model.transformer import load_model

GRID_COLUMNS = 10
_JOBS = ("samples", "reconstructions", "completions")
"""Folders of sampling jobs."""


def write_report(out: Path, pictures: str) -> None:
    """Measure what the steps left in ``out`` and write the files; ``pictures`` is the name of the set."""
    figures = {"pictures": SETS[pictures].title} | measure(out)
    write_json(out / "report.json", figures)
    samples = labelled_grid(*read_job(out / "samples"), GRID_COLUMNS)
    write_atomically(out / "samples.png", samples.save)
    write_page(out, figures)
    _write_board(out)
    shown = ("class_accuracy", "real_accuracy", "reconstruction_accuracy", "best_probe_accuracy", "prior_nll")
    print("\n".join(f"{name:26} {figures[name]:.3f}" for name in (*shown, "unigram_entropy", "fid")))


def _write_board(out: Path) -> None:
    """The pictures for TensorBoard, beside the curves of the trainings."""
    shutil.rmtree(out / "tb", ignore_errors=True)  # of a run that was killed here
    with SummaryWriter(str(out / "tb")) as board:
        board.add_image("samples", np.asarray(open_image(out / "samples.png")), dataformats="HWC")
        for name in ("reconstructions", "completions"):
            board.add_image(name, np.asarray(open_image(out / name / "grid.png")), dataformats="HWC")


def measure(out: Path) -> dict[str, Any]:
    """All figures of report.json."""
    held_out = out / "images" / "val"
    training = out / "images" / "train"
    judge = Judge(read_images(training), read_labels(training))

    pictures, labels = read_job(out / "samples")
    named = judge.predict(pictures)
    rebuilt, rebuilt_labels = read_job(out / "reconstructions")
    tokens = np.stack([sample["discriminative"] for sample in iterate(out / "shards" / "train")])  # [B, G]
    codes = read_manifest(out / "shards" / "train").discriminative_codes
    share = np.bincount(tokens.flatten(), minlength=codes) / tokens.size
    entropy = -sum(float(p) * math.log(p) for p in share if p > 0)
    paths = (out / "steps" / f"{step.name}.json" for step in steps(out, FULL))  # in their order, less this one
    notes = {path.stem: read_json(path) for path in paths if path.exists()}
    return {
        "class_accuracy": float((named == labels).mean()),
        "class_accuracy_of_each": [float((named[labels == digit] == digit).mean()) for digit in range(10)],
        "samples": len(labels),
        "real_accuracy": judge.score(read_images(held_out), read_labels(held_out)),
        "reconstruction_accuracy": judge.score(rebuilt, rebuilt_labels),
        "reconstructions": len(rebuilt_labels),
        "codes": codes,
        "codebook_perplexity": math.exp(entropy),
        "codebook_usage": sorted(share.tolist(), reverse=True),
        "unigram_entropy": entropy,
        "prior_nll": prior_nll(out / "models" / "prior", out / "shards" / "val"),
        **_fidelity(out / "fidelity.json"),
        "real_fid": read_json(out / "fidelity_real.json")["fid"],
        "kept_tokens": read_json(out / "completions" / "manifest.json")["settings"]["source"]["keep"],
        **_probe(out / "probe"),
        "seconds": {name: note["seconds"] for name, note in notes.items()},
        "commands": {name: note["command"] for name, note in notes.items()},
        "settings": {name: _drawn(out / name) for name in _JOBS},
        "total_seconds": round(sum(note["seconds"] for note in notes.values()), 1),
        "peak_memory_gib": max(note["peak_gib"] for note in notes.values()),
    }


@torch.no_grad()
def prior_nll(model_directory: Path, shards: Path) -> float:
    """Mean negative log-likelihood in nats of a held-out discriminative token, given its image's class.

    The end token, which is certain, is left out: the figure is comparable with the entropy of the tokens.
    """
    model = load_model(model_directory)
    samples = list(iterate(shards))
    codes = torch.from_numpy(np.stack([sample["discriminative"] for sample in samples]).astype(np.int64))
    labels = torch.tensor([int(sample["label"]) for sample in samples])
    total = 0.0
    for part, part_labels in zip(codes.split(128), labels.split(128)):
        sequence = training_sequence(model.spec, part, None, part_labels)
        logits = model(sequence.input)[:, :-1]  # [B, G, V]
        total += F.cross_entropy(logits.flatten(0, 1), sequence.target[:, :-1].flatten(), reduction="sum").item()
    return total / codes.numel()


def read_job(folder: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Pictures and labels of a sampling job's output."""
    return read_images(folder / "images"), np.array(read_json(folder / "manifest.json")["labels"])


def _drawn(folder: Path) -> dict[str, Any]:
    """How a sampling job drew its tokens."""
    settings = read_json(folder / "manifest.json")["settings"]
    return {name: settings.get(name) for name in ("seed", "precision", "prior_decoding", "pixel_decoding")}


def _fidelity(path: Path) -> dict[str, Any]:
    """FID and Inception Score as ``digit-ds evaluate`` wrote them, and whose features they are."""
    found = read_json(path)
    return {
        "fid": found["fid"],
        "inception_score": found["inception_score"],
        "feature_extractor": f"torch-fidelity with the demo's digit classifier ({', '.join(map(str, HIDDEN))} units)",
        "fid_samples": found["samples"],
        "fid_reference_samples": found["reference_samples"],
    }


def _probe(folder: Path) -> dict[str, Any]:
    """Accuracy of each layer's linear probe as ``digit-ds probe`` wrote it."""
    found = read_json(folder / "probe.json")
    return {
        "probe_accuracy": [layer["accuracy"] for layer in found["layers"]],
        "best_probe_accuracy": found["best_accuracy"],
        "best_probe_layer": found["best_layer"],
    }


def main(arguments: list[str]) -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the demo's folder")
    parser.add_argument("--set", choices=SETS, default="digits", help="the digits that it used (default: %(default)s)")
    options = parser.parse_args(arguments)
    write_report(options.out, options.set)


if __name__ == "__main__":
    run_command(main)
