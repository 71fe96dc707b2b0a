"""Weak scaling of training: as many images a GPU on 1, 2, 4 and 8 GPUs, beside the prediction of ``digit-ds plan``.

    python benchmarks/weak_scaling.py --gpus 1 2 4 8                # base, large and 3.7B
    python benchmarks/weak_scaling.py --sizes base --gpus 1 2
    python benchmarks/weak_scaling.py --sizes 3.7b --gpus 8 --variants zero1,parallel.tensor=4,parallel.sequence=true

For each size, variant (of ``train_speed.py``) and number of GPUs: images a second, that per GPU beside the smallest
number of GPUs measured, MFU, GiB, and from the trace of one step the milliseconds of collectives and those of them
beside which nothing runs; images a second as predicted, and measured over predicted. A layout that by ``digit-ds
estimate`` does not fit is left out and named, one of more GPUs than there are left out.

``--json`` is written after every measurement; what is in it is not measured again, but for failures. On CPUs
(``--sizes tiny --variants compile=false``) no collectives are traced, and the prediction means nothing.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from ranks import ROOT
from train_speed import SIZES, exposed, middle_step, our_metrics, recipe_of, run_name, summary

SEQUENCE = "zero1,parallel.tensor=2,parallel.sequence=true"
VARIANTS = {"base": ["zero1"], "large": ["zero1"], "3.7b": ["zero3_overlap", f"{SEQUENCE},micro_batch=64"]}
"""Of each size: what it is trained with on GPUs of one host."""


def known_gpu() -> str:
    """Kind of GPU as ``digit-ds plan`` names it; any other counts as H100."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if "A100" in name:
        return "a100-80" if torch.cuda.get_device_properties(0).total_memory > 60 * 2**30 else "a100-40"
    return "h200" if "H200" in name else "h100"


def predict(size: str, variant: str, batch: int, gpus: int) -> tuple[float, float]:
    """Images a second of all GPUs, and GiB of one, before anything runs."""
    from digit_ds.config import Recipe
    from digit_ds.model.spec import TransformerSpec
    from digit_ds.training.estimate import memory_by_part, zero_of
    from digit_ds.training.plan import predicted_step
    from digit_ds.training.settings import PlanSettings

    layers, width, heads, codes, _ = SIZES[size]
    values = recipe_of(Path("run"), Path("shards"), size, variant, batch, gpus)
    values["training"].setdefault("steps", 1)
    recipe = Recipe.model_validate(values)
    model = recipe.model
    spec = TransformerSpec(
        model.kind, layers, width, heads, model.feed_forward, model.norm_position, model.max_positions, codes, 0, 0
    )
    settings = PlanSettings.read({"recipe": "recipe.yaml", "gpus": gpus, "gpu": known_gpu()})
    parts = memory_by_part(recipe, spec, gpus // recipe.parallel.tensor, *zero_of(recipe))
    return recipe.training.global_batch / predicted_step(settings, recipe, spec).seconds, sum(parts.values())


def traced(run: Path) -> dict[str, float]:
    """Milliseconds of the traced step, of its collectives, and of those beside which nothing runs."""
    found = {}
    for trace in (run / "profile").glob("*.json"):
        kernels = middle_step(json.loads(trace.read_text())["traceEvents"])
        if kernels:
            ends = [kernel["ts"] + kernel["dur"] for kernel in kernels]
            found["step_ms"] = (max(ends) - kernels[0]["ts"]) / 1e3
            collectives = [kernel["dur"] for kernel in kernels if "nccl" in kernel["name"].lower()]
            found |= {"collectives_ms": sum(collectives) / 1e3, "exposed_ms": exposed(kernels).total() / 1e3}
    return found


def measure(folder: Path, size: str, variant: str, gpus: int, options: argparse.Namespace) -> dict:
    """One row."""
    batch = options.batch or SIZES[size][-1]
    predicted, gib = predict(size, variant, batch, gpus)
    row = {"size": size, "variant": variant, "gpus": gpus, "predicted": predicted, "estimated_gib": gib}
    if torch.cuda.is_available() and gib > torch.cuda.get_device_properties(0).total_memory / 2**30:
        return row | {"failed": f"does not fit: {gib:.0f} GiB by estimate"}
    try:
        lines = our_metrics(folder, size, variant, options.steps, batch, gpus, profile=True, show=False)
    except SystemExit as error:
        return row | {"failed": str(error)[-2000:]}
    return row | summary(lines, options.steps) | traced(folder / run_name(size, variant, gpus))


def show(row: dict, rows: list[dict]) -> None:
    """One line."""
    start = f"{row['size']:5} {row['variant']:58} {row['gpus']:2}"
    if "failed" in row:
        print(f"{start} {row['failed'].strip().splitlines()[-1]}", flush=True)
        return
    same = [other for other in rows if all(other[key] == row[key] for key in ("size", "variant"))]
    first = min((other for other in same if "failed" not in other), key=lambda other: other["gpus"])
    each, least = (at["images_per_second"] / at["gpus"] for at in (row, first))
    trace = ""
    if "exposed_ms" in row:
        trace = f", of {row['step_ms']:.1f} ms {row['collectives_ms']:.1f} collectives, {row['exposed_ms']:.1f} exposed"
    print(
        f"{start} {row['images_per_second']:8.1f} images/s, {each / least:.3f} a GPU of that on {first['gpus']}, "
        f"MFU {row['mfu']:.1%}, {row['memory_gib']:.1f} GiB{trace}; predicted {row['predicted']:.0f} "
        f"({row['images_per_second'] / row['predicted']:.2f})",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(VARIANTS))
    parser.add_argument("--variants", nargs="+", help="of train_speed.py; default: one or two for each size")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--batch", type=int, help="images a GPU (default: 256 base, 128 large, 32 3.7B)")
    parser.add_argument("--json", type=Path, default=Path("weak_scaling.json"))
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    rows = [row for row in rows if "failed" not in row]
    print(f"{device}, torch {torch.__version__}")
    for size in options.sizes:
        for variant in options.variants or VARIANTS.get(size, ["zero1"]):
            for gpus in options.gpus:
                known = [row for row in rows if (row["size"], row["variant"], row["gpus"]) == (size, variant, gpus)]
                tensor = recipe_of(Path(), Path(), size, variant, 1, gpus)["parallel"].get("tensor", 1)
                if gpus % tensor or gpus > (torch.cuda.device_count() or gpus):
                    continue
                if not known:
                    with tempfile.TemporaryDirectory() as folder:
                        rows.append(measure(Path(folder), size, variant, gpus, options))
                    facts = {"device": device, "torch": torch.__version__, "steps": options.steps, "rows": rows}
                    temporary = options.json.with_name(options.json.name + ".part")
                    temporary.write_text(json.dumps(facts, indent=1))
                    temporary.replace(options.json)
                show(known[0] if known else rows[-1], rows)


if __name__ == "__main__":
    main()
