"""Training speed beside a plain PyTorch GPT of the same size, on one GPU.

Ours is ``digit-ds train`` with a recipe, over MDS shards (of random codes), in a process of its own.
The plain model is what one would write without this project: ``torch.compile``, bf16 autocast, fused AdamW, clipping,
random tokens already on the device. Same sizes, same dropout, same images a step, post-LayerNorm.

    python benchmarks/train_speed.py                              # base at 256 images a step, large at 128
    python benchmarks/train_speed.py --sizes base --variants zero2 compile=false
    python benchmarks/train_speed.py --sizes base --variants zero1 modern
    python benchmarks/train_speed.py --sizes base --no-plain --profile
    python benchmarks/train_speed.py --sizes base --no-plain --gpus 1 2    # weak scaling: as many images a GPU
    python benchmarks/train_speed.py --sizes large --no-plain --gpus 2 --profile \
        --variants zero1 zero3_overlap zero1,parallel.tensor=2,parallel.sequence=true

A variant has parts between commas: a DeepSpeed configuration (``zero1``, the default, ``zero2``, ...), overrides of the
recipe (``compile=false`` means ``training.compile=false``), and ``modern``, the layers of
``ds_configs/modern_base_prior.yaml`` at the same size (feed-forward 8/3 x width). A tensor-parallel group has as many
images a step as one GPU.
"""

import argparse
import bisect
import itertools
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from ranks import ROOT, Ranks
from torch import Tensor, nn

SIZES = {
    "base": (16, 1024, 16, 8192, 256),
    "large": (24, 1536, 16, 16384, 128),
    "3.7b": (32, 3072, 24, 16384, 32),
    "tiny": (2, 64, 4, 64, 16),
}
"""Layers, width, heads, codes, images a step."""
DROPOUT = 0.1
GRID = 16


class PlainLayer(nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, length, width = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, self.heads, -1).transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        x = self.norm1(x + F.dropout(self.out(mixed.reshape(batch, length, width)), DROPOUT, self.training))
        return self.norm2(x + F.dropout(self.down(F.gelu(self.up(x))), DROPOUT, self.training))


class PlainGpt(nn.Module):
    """The baseline: a plain PyTorch GPT."""

    def __init__(self, layers: int, width: int, heads: int, codes: int):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(codes + 5, width), nn.Embedding(1026, width)
        self.layers = nn.ModuleList(PlainLayer(width, heads) for _ in range(layers))
        self.output = nn.Linear(width, codes + 5, bias=False)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """Label-smoothed loss."""
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        x = F.dropout(x + self.positions.weight[2 : 2 + tokens.shape[1]], DROPOUT, self.training)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.output(x).flatten(0, 1).float(), target.flatten(), label_smoothing=0.1)


def plain_speed(size: str, steps: int, batch: int) -> tuple[float, float]:
    """Images a second and peak GiB of the plain model."""
    layers, width, heads, codes, _ = SIZES[size]
    torch.manual_seed(0)
    model = PlainGpt(layers, width, heads, codes).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.98), weight_decay=0.01, fused=True)
    compiled = torch.compile(model)
    tokens = torch.randint(5, codes + 5, (batch, GRID * GRID + 2), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return batch * steps / (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 2**30


def write_shards(folder: Path, codes: int, tokens: np.ndarray | None = None) -> None:
    """Token shards: ``tokens`` int [N, T], by default 2,048 images of random ones."""
    from digit_ds.data import shards

    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, codes, (2048, GRID * GRID))
    samples = (
        {"discriminative": row.astype(np.uint16), "label": -1, "image_id": f"{i}.png", "index": i, "view": 0}
        for i, row in enumerate(tokens)
    )
    columns = [name for name in shards.COLUMNS if name != "vq"]
    shards.write_block(folder / "block-00000", samples, columns)
    index = shards.merge_blocks(folder, ["block-00000"])
    names = ("encoder_sha256", "layer", "transform", "image_size", "codebook_sha256", "vqgan_sha256")
    shards.ShardManifest(
        images=len(tokens),
        views=1,
        classes=[],
        grid=[GRID, GRID],
        image_size=256,
        discriminative_codes=codes,
        vq_codes=0,
        crops="center",
        provenance=dict.fromkeys(names),
        skipped=0,
        index_sha256=index,
    ).write(folder)


def recipe_of(run: Path, shards: Path, size: str, variant: str, batch: int, gpus: int) -> dict:
    """The recipe of a variant, ``batch`` images a GPU; a number of steps is still to be set."""
    layers, width, heads, *_ = SIZES[size]
    recipe = {
        "run": str(run),
        "deepspeed": "zero1.json",
        "model": {"layers": layers, "width": width, "heads": heads, "dropout": DROPOUT},
        "data": {"shards": str(shards), "workers": 2},
        "parallel": {},
        "training": {"compile": True},
        "checkpoint": {"every": 10**6},
        "monitor": {"log_every": 10},
    }
    for part in variant.split(","):
        if (ROOT / "ds_configs" / f"{part}.json").is_file():
            recipe["deepspeed"] = f"{part}.json"
        elif part == "modern":
            shipped = yaml.safe_load((ROOT / "ds_configs" / "modern_base_prior.yaml").read_text())["model"]
            names = ("norm_position", "normalization", "positions", "activation", "qk_norm")
            recipe["model"] |= {name: shipped[name] for name in names}
        else:
            key, _, value = part.partition("=")
            section, _, field = key.rpartition(".")
            recipe.setdefault(section or "training", {})[field] = yaml.safe_load(value)
    groups = gpus // recipe["parallel"].get("tensor", 1)
    batch = recipe["training"].setdefault("micro_batch", batch)
    recipe["training"].setdefault("global_batch", batch * groups)
    return recipe


def run_name(size: str, variant: str, gpus: int) -> str:
    """A folder's name."""
    return f"{size}-{gpus}-{re.sub('[^a-z0-9_]', '_', variant)}"


def our_metrics(
    folder: Path, size: str, variant: str, steps: int, batch: int, gpus: int, profile: bool, show: bool = True
) -> list[dict]:
    """Run ``digit-ds train`` with ``batch`` images a GPU and read its metrics."""
    codes = SIZES[size][3]
    shards = folder / f"shards-{codes}"
    if not shards.exists():
        write_shards(shards, codes)
    recipe = recipe_of(folder / run_name(size, variant, gpus), shards, size, variant, batch, gpus)
    recipe["training"].setdefault("steps", steps + (20 if profile else 10))
    recipe["monitor"].setdefault("profile_step", steps + 15 if profile else 0)  # after the lines that are timed
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run, wanted, lines = Path(recipe["run"]), recipe["training"]["steps"], []
    with Ranks(["train", path], gpus, folder / "logs" / run.name) as ranks:
        # The checkpoint of the last step, tens of GB of a large model, is not waited for.
        while None in ranks.wait(0.5) and not any(line["step"] == wanted for line in lines):
            lines = logged(run)
        if not any(line["step"] == wanted for line in logged(run)):
            ranks.finish()
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    if profile and show:
        for trace in sorted((run / "profile").glob("*.json")):
            print_parts(trace)
    return logged(run)


def summary(lines: list[dict], steps: int) -> dict[str, float]:
    """Means over the timed steps: those after the first ten and before the one that is traced."""
    timed = [line for line in lines if line["step"] > 10 and "loss" in line][: steps // 10]
    values = {
        "images_per_second": [line["images_per_second"] for line in timed],
        "data_wait": [line["data_wait_seconds"] / line["step_seconds"] for line in timed],
        "mfu": [line["mfu"] or 0 for line in timed],
    }
    means = {name: float(np.mean(found)) for name, found in values.items()}
    return means | {"memory_gib": timed[-1]["memory_gib"], "loss": timed[-1]["loss"]}


def logged(run: Path) -> list[dict]:
    """Whole lines of a run's metrics."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


PARTS = (
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|_mm_|ampere_|sm90_"),
    ("optimizer", r"adam|multi_tensor|lerp"),
    ("fused by the compiler", r"triton"),
    ("copies", r"memcpy|memset|copy"),
)


HOST = ("cpu_op", "cuda_runtime", "cuda_driver")


def print_parts(trace: Path) -> None:
    """Share of one step's device time by kind of kernel, and the largest kernels."""
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = middle_step(events)
    if not kernels:
        return
    parts, names, counts = Counter(), Counter(), Counter()
    for event in kernels:
        name = event["name"]
        part = next((part for part, pattern in PARTS if re.search(pattern, name, re.I)), "other")
        parts[part] += event["dur"]
        names[name] += event["dur"]
        counts[name] += 1
    gaps, idle = Counter(), []
    end = kernels[0]["ts"]
    for before, after in itertools.pairwise(kernels):
        end = max(end, before["ts"] + before["dur"])
        if after["ts"] > end:
            gaps[f"{before['name'][:50]} -> {after['name'][:50]}"] += after["ts"] - end
            idle.append((end, after["ts"]))
    alone = exposed(kernels)
    kinds = ", ".join(f"{name} {microseconds / 1e3:.1f}" for name, microseconds in alone.most_common())
    print(f"  communication beside which nothing runs: {alone.total() / 1e3:.1f} ms ({kinds})")
    span = max(e["ts"] + e["dur"] for e in kernels) - kernels[0]["ts"]
    busy = sum(parts.values())
    print(f"  one step: {span / 1e3:.1f} ms between first and last kernel, {busy / 1e3:.1f} ms of kernels")
    for part, microseconds in parts.most_common():
        print(f"    {part:24} {microseconds / 1e3:8.2f} ms {microseconds / busy:6.1%}")
    for name, microseconds in names.most_common(22):
        print(f"      {microseconds / 1e3:8.2f} ms {counts[name]:5} x {name[:110]}")
    print(f"    the device idles {sum(gaps.values()) / 1e3:.2f} ms, most of it between")
    for names, microseconds in gaps.most_common(6):
        print(f"      {microseconds / 1e3:8.2f} ms {names}")
    print("    while the host is in")
    for name, microseconds in host_during(events, idle).most_common(8):
        print(f"      {microseconds / 1e3:8.2f} ms {name[:110]}")


def middle_step(events: list[dict]) -> list[dict]:
    """What ran on the device in the second of three traced steps, by its beginning.

    From the first kernel that the host issued in that step to the first one that it issued in the next. What the step
    before sent beside it is part of it.
    """
    marks = [e["ts"] for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("training step ")]
    issued = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in HOST[1:] and "args" in e}
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels.sort(key=lambda event: event["ts"])
    starts = []
    for mark in sorted(marks)[1:]:
        starts.append(next((k["ts"] for k in kernels if issued.get(k["args"].get("correlation"), 0) >= mark), None))
    if len(starts) < 2 or None in starts:
        return []
    return [kernel for kernel in kernels if starts[0] <= kernel["ts"] < starts[1]]


def host_during(events: list[dict], idle: list[tuple[float, float]]) -> Counter:
    """Microseconds of the device's idle time by the shortest thing that a thread of the host did in its middle."""
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in HOST and "dur" in e)
    starts = [span[0] for span in spans]
    found = Counter()
    for begin, end in idle:
        middle = (begin + end) / 2
        near = spans[max(0, bisect.bisect(starts, middle) - 2000) : bisect.bisect(starts, middle)]
        inside = [(stop - start, name) for start, stop, name in near if stop > middle]
        found[min(inside)[1] if inside else "Python, between operations"] += end - begin
    return found


def exposed(kernels: list[dict]) -> Counter:
    """Microseconds in which the device runs kernels of NCCL and no others, by the collective that began first."""
    edges = []
    for number, kernel in enumerate(kernels):
        name = re.search(r"nccl\w*?_([a-z]+)", kernel["name"], re.I)
        collective = number, name[1] if name else ""
        edges += [(kernel["ts"], 1, collective), (kernel["ts"] + kernel["dur"], 0, collective)]
    alone, computing, collectives, last = Counter(), 0, [], 0.0
    for time_, begins, collective in sorted(edges):
        if collectives and not computing:
            alone[collectives[0][1]] += time_ - last
        if collective[1]:
            (collectives.append if begins else collectives.remove)(collective)
        else:
            computing += 1 if begins else -1
        last = time_
    return alone


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Training speed beside a plain PyTorch GPT of the same size.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base", "large"])
    parser.add_argument("--variants", nargs="+", default=["zero1"], help="zero1, compile=false, modern, ...")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--batch", type=int, help="images a step (default: 256 base, 128 large)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="GPUs of ours, data-parallel")
    parser.add_argument("--no-plain", action="store_true", help="ours only")
    parser.add_argument("--profile", action="store_true", help="share of parts of one step")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            batch = options.batch or SIZES[size][-1]
            plain = None
            if not options.no_plain:
                plain, memory = plain_speed(size, options.steps, batch)
                torch.cuda.empty_cache()
                print(f"{size:6} {'plain':14} {plain:8.1f} images/s {memory:6.1f} GiB", flush=True)
            for variant, gpus in itertools.product(options.variants, options.gpus):
                lines = our_metrics(Path(folder), size, variant, options.steps, batch, gpus, options.profile)
                found = summary(lines, options.steps)
                speed = found["images_per_second"]
                share = f", {speed / plain / gpus:.3f} of plain" if plain else ""
                print(
                    f"{size:6} {variant:14} {speed:8.1f} images/s on {gpus}, {found['memory_gib']:6.1f} GiB, "
                    f"MFU {found['mfu']:.1%}, data wait {found['data_wait']:.2%}{share}, loss {found['loss']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
