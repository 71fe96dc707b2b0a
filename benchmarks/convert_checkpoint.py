"""Time and memory of converting a full-size published checkpoint, both ways.

    python benchmarks/convert_checkpoint.py [--layers 16 --width 1024 --heads 16 --codes 8192] [--folder DIR]

Writes a random stage-1 checkpoint (default: base, 219M parameters, with an encoder's worth of tensors beside it),
converts it in a fresh process each way, compares all tensors bit by bit and prints one JSON object. Memory is the peak
resident size of the converting process, the interpreter with torch and the mapped pages of the files included;
``copied`` is the largest growth of its own memory (RssAnon, read every two milliseconds), without mapped pages.

Results (float32, torch 2.15.0):
    2026-11-23, 2 cores of a shared virtual machine, busy with other work, no GPU:
        base with encoder, 1,165 MiB: from-official 4-15 s, 1,890 MiB (1.6 x the file); to-official 12-21 s, 1,891 MiB
        base alone, 836 MiB: from-official 6 s, 1,562 MiB (1.9 x); to-official 10 s, 1,563 MiB
        (529 MiB of each peak are the interpreter and torch)
    2026-11-27, the same machine, base with encoder, 1,165 MiB, one run each:
        from-official 3.3 s, 1,761 MiB, 60 copied (1,897 and 193 while query, key and value of all layers were joined
        before the file was written); to-official 4.0 s, 1,891 MiB, 193 copied
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path

import torch

from digit_ds.model.official import from_official, to_official
from digit_ds.model.settings import FromOfficial, ToOfficial
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.weights import parameters

MEBIBYTE = 1 << 20


def write_random(path: str, spec: TransformerSpec, encoder_parameters: int) -> None:
    """A checkpoint in the published layout."""
    model = {"decoder.version": torch.tensor([3.0])}
    for parameter in parameters(spec):
        shape = (parameter.shape[0] // len(parameter.official), *parameter.shape[1:])
        model |= {f"decoder.{name}": torch.rand(shape) for name in parameter.official}
    if encoder_parameters:
        model["pretrained_encoder.all"] = torch.rand(encoder_parameters)
    options = {"_name": "stlm", "decoder_attention_heads": spec.heads, "decoder_normalize_before": False}
    torch.save({"args": None, "cfg": {"model": options}, "model": model}, path)


def measure(direction: str, source: str, target: str, answer: "multiprocessing.Queue[dict[str, float]]") -> None:
    """Convert in this process and report."""
    before, largest, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.002):
            largest = max(largest, own_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if direction == "from-official":
        from_official(FromOfficial(checkpoint=source, out=target))
    else:
        to_official(ToOfficial(model=source, out=target))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"peak_mib": round(peak / MEBIBYTE), "copied_mib": round(largest / MEBIBYTE)}
    answer.put({"seconds": round(seconds, 1), **figures})


def own_memory() -> int:
    """Resident bytes of this process that are no pages of files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run both directions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 16), ("width", 1024), ("heads", 16), ("codes", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--encoder-parameters", type=int, default=86_000_000)
    parser.add_argument("--folder", help="where to put the files (several times the checkpoint's size)")
    options = parser.parse_args()
    spec = TransformerSpec(
        "prior", options.layers, options.width, options.heads, 4 * options.width, "post", 1024, options.codes, 0, 0
    )
    spawn = multiprocessing.get_context("spawn")  # a fresh process, so that its peak is the conversion's

    def fresh(function, *arguments):
        process = spawn.Process(target=function, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{function.__name__} failed")

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        original, model, back = (str(Path(folder) / name) for name in ("original.pt", "model", "back.pt"))
        fresh(write_random, original, spec, options.encoder_parameters)
        report: dict = {"file_mib": round(Path(original).stat().st_size / MEBIBYTE)}
        for direction, source, target in (("from-official", original, model), ("to-official", model, back)):
            answer = spawn.Queue()
            fresh(measure, direction, source, target, answer)
            report[direction] = answer.get()
        first, second = (torch.load(path, weights_only=True, mmap=True)["model"] for path in (original, back))
        report["bit_exact"] = first.keys() == second.keys() and all(
            torch.equal(first[name], second[name]) for name in first
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
