"""Memory and time of each value of ``training.recompute``, on one GPU or CPU.

    python benchmarks/recompute_cost.py                                                    # large, 128 images, a GPU
    python benchmarks/recompute_cost.py --layers 4 --batch 4 --steps 3 --no-compile        # four such layers, a CPU

Builds the engine as ``digit-ds train`` does (bf16, dropout 0.1, ZeRO 1) and trains it on random tokens. Prints a row
for each value: the memory that the forward pass keeps for the backward pass, what ``digit-ds estimate`` counts
(activations and logits: in addition one layer that is being recomputed), the peak of a GPU, and the time of a step with
its ratio to ``none``. The values take turns; medians count. On a CPU memory is the resident size of the process; to
measure it, every tensor is mapped anew, which makes the times of a CPU no guide.
"""

import argparse
import ctypes
import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

import start_memory
import torch
from train_speed import SIZES

from digit_ds.config import Recipe
from digit_ds.model.megatron import Recompute
from digit_ds.parallel import launch, topology
from digit_ds.training import runs
from digit_ds.training.engine import Engine
from digit_ds.training.estimate import memory_by_part

VALUES = get_args(Recompute)
GIB = 2**30
ROUNDS = 3


def recipe(run: Path, options: argparse.Namespace, recompute: str) -> Recipe:
    """The size of ``options``; nothing of its data is read."""
    layers, width, heads, _, batch = SIZES[options.size]
    made = start_memory.recipe(run, (options.layers or layers, width, heads), 1, 1, None)
    images = options.batch or batch
    changes = {"global_batch": images, "micro_batch": images, "recompute": recompute, "compile": options.compile}
    return made.model_copy(update={"training": made.training.model_copy(update=changes)})


def held(device: torch.device) -> int:
    """Bytes in use."""
    if device.type == "cpu":
        return start_memory.memory("VmRSS")
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(device)


def step(engine: Engine, tokens: torch.Tensor, device: torch.device) -> tuple[float, int]:
    """One training step: its seconds, and the bytes that the forward pass left behind."""
    before, start = held(device), time.perf_counter()
    loss, _ = engine.loss(tokens[:, :-1], tokens[:, 1:], None)
    kept = held(device) - before
    engine.backward(loss)
    engine.step(1e-4)
    held(device)  # waits for a GPU
    return time.perf_counter() - start, kept


def main(options: argparse.Namespace) -> None:
    """Measure every value."""
    codes = SIZES[options.size][3]
    place, device = topology.initialize(1, 600.0), launch.device()
    if device.type == "cpu":
        m_mmap_threshold = -3
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16)  # what a tensor frees leaves the process at once
    with tempfile.TemporaryDirectory() as folder:
        recipes = {value: recipe(Path(folder), options, value) for value in VALUES}
        spec = runs.model_spec(recipes["none"], start_memory.manifest(codes))
        engine = Engine(recipes["none"], spec, place, device)
    engine.train()
    batch = recipes["none"].training.global_batch
    tokens = torch.randint(5, codes, (batch, spec.sequence_length + 1), device=device)
    seconds: dict[str, list[float]] = {value: [] for value in VALUES}
    kept, peaks = {}, {}
    for _ in range(ROUNDS):
        for value in VALUES:
            engine.model.recompute = value
            for layer in engine.model.layers:
                layer.recompute = value
            step(engine, tokens, device)  # compiles, fills the allocator
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            found = [step(engine, tokens, device) for _ in range(options.steps)]
            seconds[value] += [duration for duration, _ in found]
            kept[value] = statistics.median(size for _, size in found) / GIB
            peaks[value] = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else float("nan")
    print(f"{options.size}, {spec.layers} layers, {batch} images a step, {device}; {engine.kernels}")
    print("recompute       kept GiB  estimate  peak GiB  s/step  of none")
    first = statistics.median(seconds["none"])
    for value in VALUES:
        parts = memory_by_part(recipes[value], spec, 1, 1, False)
        counted = parts["activations"] + parts["logits"]
        median = statistics.median(seconds[value])
        row = f"{value:14} {kept[value]:9.2f} {counted:9.2f} {peaks[value]:9.2f} {median:7.3f} {median / first:8.3f}"
        print(row, flush=True)
    topology.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--layers", type=int, help="default: those of the size")
    parser.add_argument("--batch", type=int, help="images a step; default: those of the size")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a value in each of the rounds")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    main(parser.parse_args())
