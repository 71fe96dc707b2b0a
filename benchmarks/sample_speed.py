"""Sampling speed on one GPU: the prior alone, then the whole way of a picture with the share of each part.

    python benchmarks/sample_speed.py                         # base at 1,024 images a batch, large at 512, prior only
    python benchmarks/sample_speed.py --pipeline              # base and large with AR and NAR decoder, VQGAN and PNGs
    python benchmarks/sample_speed.py --profile               # kernels of one batch of the prior, by time
    python benchmarks/sample_speed.py --modern                # the layers of ds_configs/modern_base_prior.yaml

Random weights at full size (16 x 16 tokens, bfloat16, top-k 200 / 400, a VQGAN of MAGE's size): the numbers drawn mean
nothing, the work is that of the real models. Prints one JSON object a measurement.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import cpu_count
from pathlib import Path

import torch

from digit_ds.generation.pictures import write_png
from digit_ds.generation.pipeline import BLOCK, Pipeline, make_sampler
from digit_ds.generation.settings import Decoding
from digit_ds.model.decoder import Decoder
from digit_ds.model.spec import TransformerSpec
from digit_ds.tokenizer.vqgan import MAGE_CONFIG, Vqgan
from digit_ds.tokenizer.vqgan_network import VqganNetwork

SIZES = {"base": (16, 1024, 8192, 200, 1024), "large": (24, 1536, 16384, 400, 512)}
"""Layers, width, codes, top-k, images a batch."""
MODERN = {"normalization": "rms", "positions": "rotary2d", "activation": "swiglu", "qk_norm": True}


def random_model(kind: str, size: str, modern: bool = False) -> Decoder:
    """A model of full size on the GPU; pixel decoders are of base size for both priors."""
    codes = SIZES[size][2]
    layers, width = SIZES[size if kind == "prior" else "base"][:2]
    vq_codes = 0 if kind == "prior" else 1024
    norm = "post" if kind == "prior" else "pre"
    spec = TransformerSpec(kind, layers, width, 16, 4 * width, norm, 1024, codes, vq_codes, 0)
    if modern:
        spec = replace(spec, norm_position="pre", ffn_width=round(width / 48) * 128, **MODERN)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Decoder(spec)
    for table in (module for module in model.modules() if isinstance(module, torch.nn.Embedding)):
        torch.nn.init.normal_(table.weight, 0.0, width**-0.5)
    return model.bfloat16().eval().requires_grad_(False)


def seconds(run: Callable[[], object], times: int = 3) -> float:
    """Median time of a call after a first one that compiles and captures."""
    run()
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def report(**values: object) -> None:
    """One measurement as a line of JSON."""
    gpu = torch.cuda.get_device_name()
    print(
        json.dumps({**values, "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1), "gpu": gpu}),
        flush=True,
    )


def measure_prior(size: str, batch: int, modern: bool, profile: bool) -> None:
    """Images per second of the prior's 256 tokens."""
    sampler = make_sampler(random_model("prior", size, modern), Decoding(top_k=SIZES[size][3]), seed=0, rows=batch)
    images = torch.arange(batch)
    taken = seconds(lambda: sampler(images))
    report(measured="prior", size=size, modern=modern, batch=batch, images_per_second=round(batch / taken, 1))
    if profile:
        with torch.profiler.profile() as profiler:
            sampler(images)
            torch.cuda.synchronize()
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=80))


def measure_pipeline(size: str, kind: str, batch: int, pixel_batch: int, dtype: torch.dtype) -> None:
    """Seconds and shares of prior, pixel decoder, VQGAN and PNG files for one batch, and the rate when files are
    written by threads behind the next batch.
    """
    prior = make_sampler(random_model("prior", size), Decoding(top_k=SIZES[size][3]), seed=0, rows=batch)
    decoding = Decoding(top_p=0.8 if kind == "ar" else None)
    pixels = make_sampler(random_model(kind, size), decoding, seed=0, rows=pixel_batch)
    with torch.device("cuda"):
        network = VqganNetwork(MAGE_CONFIG["ddconfig"], MAGE_CONFIG["n_embed"])
    painter = Vqgan(network.to(dtype).eval().requires_grad_(False), "random")
    pipeline = Pipeline(prior, pixels, painter)
    images = torch.arange(batch)
    codes = pipeline.write(images)
    blocks = codes.vq.split(BLOCK)
    parts = {
        "prior": seconds(lambda: prior(images)),
        "pixel_decoder": seconds(lambda: pixels(images, prefix=codes.discriminative), times=1),
        "vqgan": seconds(lambda: [pipeline.paint(block) for block in blocks], times=1),
    }
    pictures = [picture for block in blocks for picture in pipeline.paint(block)]
    threads = min(16, cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as writers:
        paths = [Path(folder) / f"{number:06d}.png" for number in range(batch)]
        start = time.perf_counter()
        list(writers.map(write_png, paths, pictures))
        parts["png"] = time.perf_counter() - start
    on_gpu = parts["prior"] + parts["pixel_decoder"] + parts["vqgan"]
    report(
        measured="pipeline",
        size=size,
        pixel_decoder=kind,
        vqgan_dtype=str(dtype),
        batch=batch,
        pixel_batch=pixel_batch,
        png_threads=threads,
        seconds={name: round(value, 2) for name, value in parts.items()},
        share={name: round(value / sum(parts.values()), 3) for name, value in parts.items()},
        images_per_second_one_after_the_other=round(batch / sum(parts.values()), 1),
        images_per_second_files_behind=round(batch / max(on_gpu, parts["png"]), 1),
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch", type=int, help="images a batch (default: 1,024 for base, 512 for large)")
    parser.add_argument("--pixel-batch", type=int, default=256, help="images a batch of the pixel decoder")
    parser.add_argument("--pipeline", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--modern", action="store_true", help="modern layers (of the prior alone)")
    options = parser.parse_args()
    for size in options.sizes:
        batch = options.batch or SIZES[size][4]
        if not options.pipeline:
            measure_prior(size, batch, options.modern, options.profile)
        else:
            for kind, dtype in (("ar", torch.float32), ("nar", torch.float32), ("nar", torch.bfloat16)):
                measure_pipeline(size, kind, batch, options.pixel_batch, dtype)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
