"""Memory and seconds of starting, saving and resuming a training, of each rank, on CPUs or GPUs.

    python benchmarks/start_memory.py [--layers 12 --width 768 --heads 12 --codes 16384] [--layouts zero1-dp2 ...]
    python benchmarks/start_memory.py --layers 32 --width 3072 --heads 24 --layouts zero1-tp2-dp4 zero3-dp8
    python benchmarks/start_memory.py --layouts zero1-tp2-dp4 --resume-at zero3-tp4-dp2

Builds the engine as ``digit-ds train`` does, in bf16, for each layout: new weights, weights of a released model
(``training.start_from``) and a checkpoint. Prints a row for each rank. ``share`` is what the rank needs from then on:
its part of the weights, gradients, float32 masters and moments, as ``digit-ds estimate`` counts them. ``held`` and
``peak`` are the resident sizes after and during the start, less that of a process with a small engine. ``bound`` is the
share and the largest whole tensor in float32. Pages of mapped files count. On GPUs the weights lie elsewhere: ``gpu``
is the largest device memory allocated. ``start`` is the seconds of the measured start; behind a resume stand those of
the save that it reads: how long training waited for it, and how long until the checkpoint was complete.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch
from ranks import free_port

from digit_ds.config import Recipe
from digit_ds.data.shards import ShardManifest

MEBIBYTE = 1 << 20
STARTS = ("new", "start_from", "resume")
SMALL = (1, 64, 4)


def recipe(
    run: Path, sizes: tuple[int, int, int], stage: int, tensor: int, start_from: Path | None, ema: float = 0.0
) -> Recipe:
    """Layers, width and heads ``sizes``; nothing of its data is read."""
    layers, width, heads = sizes
    values = {
        "run": str(run),
        "deepspeed": f"zero{stage}.json",
        "model": {"layers": layers, "width": width, "heads": heads, "max_positions": 300},
        "data": {"shards": "none"},
        "training": {"steps": 1, "global_batch": 16, "micro_batch": 1, "compile": False, "ema_decay": ema},
        "parallel": {"tensor": tensor},
    }
    if start_from is not None:
        values["training"]["start_from"] = str(start_from)
    return Recipe.model_validate(values)


def manifest(codes: int) -> ShardManifest:
    """Of shards that no step reads."""
    known = dict.fromkeys(("encoder_sha256", "layer", "transform", "image_size", "codebook_sha256", "vqgan_sha256"))
    return ShardManifest(
        images=1,
        views=1,
        classes=[],
        grid=[16, 16],
        image_size=256,
        discriminative_codes=codes,
        vq_codes=0,
        crops="center",
        provenance=known,
        skipped=0,
        index_sha256="0",
    )


def memory(name: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}")


def share_of(values: Recipe, spec, data_size: int) -> int:
    """Bytes of the weights, gradients, masters and moments of one rank, as ``digit-ds estimate`` counts them."""
    from digit_ds.training.estimate import memory_by_part, zero_of

    parts = memory_by_part(values, spec, data_size, *zero_of(values))
    return int(sum(parts[name] for name in ("weights", "gradients", "optimizer")) * 2**30)


def start(rank: int, world: int, port: int, job: dict) -> None:
    """One rank: a small engine first, then the measured start; writes its figures."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    with Path(job["folder"], f"rank{rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from digit_ds.model import weights
    from digit_ds.parallel import launch, topology
    from digit_ds.training import resume, runs
    from digit_ds.training.checkpoint import Checkpoints
    from digit_ds.training.engine import Engine

    torch.set_num_threads(1)
    place = topology.initialize(job["tensor"], 600.0)
    folder, device = Path(job["folder"]), launch.device()
    small = recipe(folder / "small", SMALL, job["stage"], job["tensor"], None)
    list(Engine(small, runs.model_spec(small, manifest(64)), place, device).fragments())
    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    values = recipe(run, job["sizes"], job["stage"], job["tensor"], job["start_from"], job.get("ema", 0.0))
    tokens = manifest(job["codes"])
    spec = runs.model_spec(values, tokens)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    launch.barrier()
    clock = time.perf_counter()
    begun = resume.begin(values, tokens, spec, place, device, resume.NO_CHANGES, [])
    launch.barrier()
    figures = {
        "start": time.perf_counter() - clock,
        "gpu": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "peak": memory("VmHWM") - before,
        "held": memory("VmRSS") - before,
        "share": share_of(values, spec, place.data_size),
    }
    figures["largest"] = 4 * max(math.prod(parameter.shape) for parameter in weights.parameters(spec))
    if job["save"]:
        checkpoints = Checkpoints(run, 1, 0, world, place.sum)
        begun.progress.step = 1
        launch.barrier()
        clock = time.perf_counter()
        checkpoints.start(begun.engine, spec, begun.progress, {"provenance": begun.provenance})
        figures["save_waits"] = time.perf_counter() - clock
        if not checkpoints.wait():
            raise SystemExit("the checkpoint could not be written")
        figures["save"] = time.perf_counter() - clock
    (folder / f"rank{rank}.json").write_text(json.dumps(figures))
    topology.finish()


def measure(world: int, job: dict) -> list[dict]:
    """Figures of every rank."""
    port = free_port()
    # A fork of a process that has touched CUDA cannot use it.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["digit_ds.training.loop"])
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=start, args=(rank, world, port, job)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        logs = sorted(Path(job["folder"]).glob("rank*.log"))
        raise SystemExit("a rank failed:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
    return [json.loads((Path(job["folder"]) / f"rank{rank}.json").read_text()) for rank in range(world)]


def write_model(folder: Path, sizes: tuple[int, int, int], codes: int) -> None:
    """A released model to start from."""
    from digit_ds.model.released import save_model
    from digit_ds.model.weights import initial_state
    from digit_ds.training.runs import model_spec

    spec = model_spec(recipe(folder, sizes, 1, 1, None), manifest(codes))
    save_model(folder, spec, initial_state(spec, 0), dict(manifest(codes).identity))


def main() -> None:
    """Measure every layout and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in (("layers", 12), ("width", 768), ("heads", 12), ("codes", 16384)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--layouts", nargs="+", default=["zero1-dp2", "zero3-dp2", "zero1-tp2"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--resume-at", help="the layout of the resumes; default: that of the save")
    options = parser.parse_args()
    sizes = options.layers, options.width, options.heads
    print(f"{'layout':14} {'start':10} rank {'share':>7} {'held':>7} {'peak':>7} {'gpu':>7} MiB  peak / bound  start s")
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        if "start_from" in options.starts:
            write_model(model, sizes, options.codes)
        for layout in options.layouts:
            folder = Path(temporary) / layout
            common = {"sizes": sizes, "codes": options.codes, "save": False, "start_from": None}
            for begin in options.starts:
                job, at, saved = common | {"folder": str(folder / begin)}, layout, None
                if begin == "resume":
                    world, cut = layout_of(layout)
                    saved = measure(world, job | cut | {"save": True})
                    at = options.resume_at or layout
                world, cut = layout_of(at)
                origin = model if begin == "start_from" else None
                for rank, found in enumerate(measure(world, job | cut | {"start_from": origin})):
                    report(at, begin, rank, found)
                if saved:
                    waits, whole = (max(found[name] for found in saved) for name in ("save_waits", "save"))
                    print(f"{layout:14} save: training waits {waits:.2f} s, complete after {whole:.2f} s", flush=True)
            shutil.rmtree(folder)


def layout_of(text: str) -> tuple[int, dict[str, int]]:
    """Number of ranks, and what a job needs to know of ``zero1-tp2-dp4``."""
    match = re.fullmatch(r"zero([0-3])(?:-tp(\d+))?(?:-dp(\d+))?", text)
    if not match:
        raise SystemExit(f"--layouts: {text!r}, expected for example zero1-tp2-dp4")
    tensor = int(match[2] or 1)
    return tensor * int(match[3] or 1), {"stage": int(match[1]), "tensor": tensor}


def report(layout: str, begin: str, rank: int, found: dict[str, float]) -> None:
    """One row."""
    figures = "".join(f" {found[name] / MEBIBYTE:7.0f}" for name in ("share", "held", "peak", "gpu"))
    bound = found["peak"] / (found["share"] + found["largest"])
    print(f"{layout:14} {begin:10} {rank:4}{figures}      {bound:8.2f} {found['start']:8.2f}", flush=True)


if __name__ == "__main__":
    main()
