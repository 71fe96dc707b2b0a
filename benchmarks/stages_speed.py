"""K-Means, tokenising and sampling on several GPUs: speed beside one, and whether every byte is that of one.

    python benchmarks/stages_speed.py --gpus 1 2 4 8 --json stages_speed.json
    python benchmarks/stages_speed.py --gpus 1 4 --small          # tiny models, for CPUs

The commands ``digit-ds kmeans``, ``tokenize`` and ``sample`` run as on a cluster, on models of base size with random
weights. Each runs twice, on some work and on all of it (K-Means: 20 and 220 iterations over 1,048,576 points of width
768, 8,192 clusters; 4,096 and 32,768 photographs; 2,048 and 10,240 pictures in batches of 256): the rate is the
difference of the work over that of the seconds, without the start and the end, which are printed beside it. The files
of all the work are compared with those of the first number of GPUs, byte by byte, TensorBoard's left out.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ranks import ROOT, Ranks
from tokenize_speed import photographs, random_encoder

STAGES = ("kmeans", "tokenize", "sample")


@dataclass(frozen=True)
class Work:
    """Sizes of everything; of two numbers the first is some of the work, the second all of it."""

    points: int = 1 << 20
    width: int = 768
    clusters: int = 8192
    iterations: tuple[int, int] = (20, 220)
    images: tuple[int, int] = (4096, 32768)
    encoder_blocks: int = 12
    layers: int = 16
    model_width: int = 1024
    heads: int = 16
    pictures: tuple[int, int] = (2048, 10240)
    batch: int = 256
    mage: bool = True
    """A VQGAN of MAGE's size, with which images are tokenised too; else a tiny one that only paints."""


SMALL = Work(4096, 64, 64, (4, 12), (16, 64), 4, 2, 64, 4, (32, 128), 16, mage=False)


def make_parts(folder: Path, work: Work, stages: Sequence[str] = STAGES) -> dict[str, Path]:
    """What ``stages`` need of points, photographs, and models with random weights that belong together."""
    from digit_ds.files import sha256
    from digit_ds.model.released import save_model
    from digit_ds.model.spec import TransformerSpec
    from digit_ds.model.weights import initial_state
    from digit_ds.tokenizer.codebook import save_codebook
    from digit_ds.tokenizer.vqgan import MAGE_CONFIG
    from digit_ds.tokenizer.vqgan_network import VqganNetwork

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if "kmeans" in stages:
        np.save(folder / "points.npy", torch.randn(work.points, work.width).numpy())
    names = ("points.npy", "encoder.pth", "codebook.npy", "vqgan.ckpt", "vqgan.yaml", "prior", "nar", "some", "all")
    parts = {name.partition(".")[0]: folder / name for name in names if name != "vqgan.yaml"}
    parts["config"] = folder / "vqgan.yaml"
    random_encoder(parts["encoder"], work.width, work.encoder_blocks)
    origin = {"encoder_sha256": sha256(parts["encoder"]), "layer": 3}
    save_codebook(parts["codebook"], torch.randn(work.clusters, work.width), origin)
    origin["codebook_sha256"] = sha256(parts["codebook"])
    config = MAGE_CONFIG
    if not work.mage:
        small = {"z_channels": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
        config = {"embed_dim": 8, "n_embed": 64, "ddconfig": small}
    torch.save({"state_dict": VqganNetwork(config["ddconfig"], config["n_embed"]).state_dict()}, parts["vqgan"])
    parts["config"].write_text(yaml.safe_dump({"model": {"params": config}}))
    if "sample" in stages:
        spec = TransformerSpec(
            "prior", work.layers, work.model_width, work.heads, 4 * work.model_width, "post", 1024, work.clusters, 0, 0
        )
        save_model(parts["prior"], spec, initial_state(spec, 0), origin)
        spec = replace(spec, kind="nar", norm_position="pre", vq_codes=config["n_embed"])
        save_model(parts["nar"], spec, initial_state(spec, 1), origin | {"vqgan_sha256": sha256(parts["vqgan"])})
    if "tokenize" in stages:
        for name, count in zip(("some", "all"), work.images):
            photographs(parts[name], count)
    return parts


def command(stage: str, out: Path, whole: bool, parts: dict[str, Path], work: Work) -> tuple[list, int]:
    """Arguments of ``digit-ds`` for some or the whole of the work, and how much that is."""
    if stage == "kmeans":
        count = work.iterations[whole]
        clusters = ("--clusters", work.clusters, "--iterations", count)
        return ["kmeans", "--features", parts["points"], *clusters, "--out", out / "km.npy"], count
    vqgan = ("--vqgan", parts["vqgan"], "--vqgan-config", parts["config"])
    if stage == "tokenize":
        tokenizer = ("--encoder", parts["encoder"], "--codebook", parts["codebook"], *(vqgan if work.mage else ()))
        size = ("--precision", "bf16", "--block-images", max(4, work.batch)) if work.mage else ("--block-images", 4)
        images = parts["all" if whole else "some"]
        return ["tokenize", "--images", images, *tokenizer, *size, "--out", out / "tokens"], work.images[whole]
    count = work.pictures[whole]
    models = ("--prior", parts["prior"], "--decoder", parts["nar"], *vqgan, "--top-k", 200)
    size = ("--count", count, "--batch", work.batch, *(("--vqgan-precision", "bf16") if work.mage else ()))
    return ["sample", *models, *size, "--out", out / "samples"], count


def run(arguments: list, gpus: int, log: Path) -> float:
    """Seconds of a command."""
    began = time.monotonic()
    with Ranks(arguments, gpus, log) as ranks:
        ranks.finish()
    return time.monotonic() - began


def content(folder: Path) -> dict[str, str]:
    """A hash of every file but TensorBoard's, whose names and contents hold times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "tb"
    }


def measure(
    stage: str, gpus: int, folder: Path, parts: dict[str, Path], work: Work
) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures of a stage, and its files."""
    amounts, seconds = [], []
    for whole in (False, True):
        out = folder / f"{stage}-{gpus}-{whole}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        arguments, amount = command(stage, out, whole, parts, work)
        seconds.append(run(arguments, gpus, folder / "logs" / out.name))
        amounts.append(amount)
        files = content(out)
        shutil.rmtree(out)
    more = seconds[1] - seconds[0]
    rate = (amounts[1] - amounts[0]) / more if more > 0 else None
    return {"stage": stage, "gpus": gpus, "rate": rate, "seconds": seconds, "work": amounts}, files


def differences(first: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of files that are not the same."""
    return sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))


def describe(row: dict[str, Any], first: dict[str, Any]) -> str:
    """One line."""
    same = "every byte equal" if not row["other_files"] else f"OTHER: {', '.join(row['other_files'][:5])}"
    start = f"{row['stage']:9} {row['gpus']:2}"
    if not row["rate"] or not first["rate"]:
        return f"{start} too little work for a rate: {row['seconds'][0]:.1f} and {row['seconds'][1]:.1f} s; {same}"
    ends = row["seconds"][0] - row["work"][0] / row["rate"]
    ratio = row["rate"] / first["rate"]
    rate = f"{row['rate']:10.1f} {UNITS[row['stage']]}, {ratio:.2f} of {first['gpus']}"
    return f"{start} {rate}; start and end {ends:.1f} s; {same}"


UNITS = {"kmeans": "iterations/s", "tokenize": "images/s", "sample": "pictures/s"}


def measure_all(options: argparse.Namespace, folder: Path, note: Callable[[list[dict]], None]) -> list[dict]:
    """A row for every stage and number of GPUs; ``note`` gets what there is after each."""
    work, rows = SMALL if options.small else Work(), []
    parts = make_parts(folder / "parts", work, options.stages)
    for stage in options.stages:
        first = None
        for gpus in options.gpus:
            row, files = measure(stage, gpus, folder, parts, work)
            first = first or (row, files)
            row["other_files"] = differences(first[1], files)
            rows.append(row)
            note(rows)
            print(describe(row, first[0]), flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--small", action="store_true", help="tiny models and little work")
    parser.add_argument("--json", type=Path, default=Path("stages_speed.json"))
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

    def note(rows: list[dict]) -> None:
        options.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(options, Path(folder), note)
    sys.exit(1 if any(row["other_files"] for row in rows) else 0)


if __name__ == "__main__":
    main()
