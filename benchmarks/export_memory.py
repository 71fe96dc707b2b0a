"""Memory of ``digit-ds export``, from checkpoints of several layouts, on CPUs.

    python benchmarks/export_memory.py [--layers 12 --width 768 --heads 12 --codes 16384] [--layouts zero1-dp2 ...]

Saves a checkpoint of a model with a moving average at each layout, as ``benchmarks/start_memory.py`` does, and exports
its weights and its average in a process of its own, then the weights again, which finds that the model is there
already. ``peak`` is the largest resident size of that process, less what the same process needs for a model of one
small layer; pages of mapped files count. ``model`` is the size of the file that is written, ``largest`` that of its
largest tensor.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

from safetensors import safe_open
from start_memory import MEBIBYTE, SMALL, measure, memory


def export_here(run: Path, out: Path, average: bool, figures: Path) -> None:
    """Export in this process and write its peak."""
    from digit_ds.training.export import export
    from digit_ds.training.settings import ExportSettings

    begun = time.perf_counter()
    export(ExportSettings(run=str(run), out=str(out), ema=average))
    figures.write_text(json.dumps([memory("VmHWM"), time.perf_counter() - begun]))


def peak(run: Path, out: Path, average: bool) -> tuple[int, float]:
    """Largest resident size of an export and its seconds."""
    figures = run / "figures.json"
    process = multiprocessing.get_context("spawn").Process(target=export_here, args=(run, out, average, figures))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the export of {run} failed")
    found = json.loads(figures.read_text())
    return found[0], found[1]


def main() -> None:
    """Measure every layout and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in (("layers", 12), ("width", 768), ("heads", 12), ("codes", 16384)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--layouts", nargs="+", default=["zero1-dp2", "zero1-tp2"])
    options = parser.parse_args()
    print(f"{'layout':10} {'export':8} {'model':>7} {'largest':>7} {'peak':>7} MiB  seconds")
    with tempfile.TemporaryDirectory() as temporary:
        for layout in options.layouts:
            zero, _, kind = layout.partition("-")
            world = int(kind[2:])
            folder = Path(temporary) / layout
            job = {"stage": int(zero[4:]), "tensor": world if kind.startswith("tp") else 1, "save": True,
                   "start_from": None, "ema": 0.999}  # fmt: skip
            large = {"sizes": (options.layers, options.width, options.heads), "codes": options.codes}
            measure(world, job | large | {"folder": str(folder / "large")})
            measure(world, job | {"sizes": SMALL, "codes": 64, "folder": str(folder / "small")})
            exports = ("weights", "model", False), ("average", "ema", True), ("again", "model", False)
            for name, out, average in exports:
                base, _ = peak(folder / "small" / "run", folder / "small" / out, average)
                found, seconds = peak(folder / "large" / "run", folder / "large" / out, average)
                weights = folder / "large" / out / "model.safetensors"
                with safe_open(weights, framework="pt") as file:
                    largest = max(file.get_tensor(tensor).nbytes for tensor in file.keys())  # noqa: SIM118
                figures = [weights.stat().st_size / MEBIBYTE, largest / MEBIBYTE, (found - base) / MEBIBYTE]
                print(f"{layout:10} {name:8} {figures[0]:7.0f} {figures[1]:7.0f} {figures[2]:7.0f}      {seconds:7.1f}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
