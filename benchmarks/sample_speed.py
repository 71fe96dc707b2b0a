"""Sampling speed on one GPU: the prior alone, the VQGAN alone, then the whole way of a picture with the share of each
part.

    python benchmarks/sample_speed.py                         # base at 1,024 images a batch, large at 512, prior only
    python benchmarks/sample_speed.py --vqgan                 # its decoder in every precision and layout, and compiled
    python benchmarks/sample_speed.py --pipeline              # base and large, AR and NAR decoder, VQGANs, PNGs
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
from functools import partial
from os import cpu_count
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from digit_ds.generation.pictures import write_png
from digit_ds.generation.pipeline import BLOCK, Pipeline, make_sampler
from digit_ds.generation.settings import Decoding
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import Transformer
from digit_ds.tokenizer.vqgan import MAGE_CONFIG, Vqgan, to_uint8
from digit_ds.tokenizer.vqgan_network import VqganNetwork

SIZES = {"base": (16, 1024, 8192, 200, 1024), "large": (24, 1536, 16384, 400, 512)}
"""Layers, width, codes, top-k, images a batch."""
MODERN = {"normalization": "rms", "positions": "rotary2d", "activation": "swiglu", "qk_norm": True}
PAINTERS = [("float32", False), ("bfloat16", False), ("bfloat16", True), ("float16", True)]
"""How the pipeline's VQGAN runs: precision, compiled or not."""
VQGAN_VARIANTS = [
    ("float32", "contiguous", False),
    ("float32", "channels_last", False),
    ("tf32", "contiguous", False),
    ("tf32", "channels_last", False),
    ("bfloat16", "contiguous", False),
    ("bfloat16", "channels_last", False),
    ("bfloat16", "contiguous", True),
    ("bfloat16", "channels_last", True),
    ("float16", "channels_last", False),
    ("float16", "channels_last", True),
]
"""Precision, layout of the weights, compiled or not, of the VQGAN alone."""


def random_model(kind: str, size: str, modern: bool = False) -> Transformer:
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
        model = Transformer(spec)
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


def random_vqgan(precision: str, compiled: bool = False) -> Vqgan:
    """A VQGAN of MAGE's size on the GPU; always the same weights."""
    torch.compiler.reset()  # after some recompilations of one function dynamo would leave it uncompiled
    torch.manual_seed(0)
    network = VqganNetwork(MAGE_CONFIG["ddconfig"], MAGE_CONFIG["n_embed"])
    painter = Vqgan(network.to("cuda", getattr(torch, precision)).eval().requires_grad_(False), "random")
    if compiled:
        painter.compile_decoder()
    return painter


def decoder_flops() -> int:
    """Floating-point operations of the VQGAN's decoder for one picture."""
    with torch.device("meta"):
        network = VqganNetwork(MAGE_CONFIG["ddconfig"], MAGE_CONFIG["n_embed"])
        with FlopCounterMode(display=False) as counter:
            network.decode(torch.zeros(1, MAGE_CONFIG["ddconfig"]["z_channels"], 16, 16))
    return counter.get_total_flops()


@torch.inference_mode()
def measure_vqgan(images: int) -> None:
    """Images per second of the VQGAN's decoder in blocks of BLOCK, and how far its pixels are from float32's."""
    ids = torch.randint(MAGE_CONFIG["n_embed"], (images, 16, 16), generator=torch.Generator().manual_seed(0)).cuda()
    exact = to_uint8(random_vqgan("float32").decode(ids[:BLOCK])).int()
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    for precision, layout, compiled in VQGAN_VARIANTS:
        torch.cuda.empty_cache()
        tf32 = precision == "tf32"
        painter = random_vqgan("float32" if tf32 else precision)
        if layout == "channels_last":
            painter.to(memory_format=torch.channels_last)
        if compiled:
            painter.network.decoder.compile(dynamic=False)
        network = painter.network

        def paint(block: torch.Tensor, network: VqganNetwork = network) -> torch.Tensor:
            return to_uint8(network.decode(network.embed(block)))

        if precision in ("float32", "tf32"):
            convolution.fp32_precision = "tf32" if tf32 else "ieee"
        difference = (paint(ids[:BLOCK]).int() - exact).abs()
        taken = seconds(lambda paint=paint: [paint(block) for block in ids.split(BLOCK)])
        convolution.fp32_precision = before
        report(
            measured="vqgan",
            precision=precision,
            layout=layout,
            compiled=compiled,
            images_per_second=round(images / taken, 1),
            tflops=round(decoder_flops() * images / taken / 1e12, 1),
            pixel_levels_off={"largest": int(difference.max()), "mean": round(float(difference.float().mean()), 4)},
        )


def measure_pipeline(size: str, kind: str, batch: int, pixel_batch: int) -> None:
    """Seconds and shares of prior, pixel decoder, VQGAN and PNG files for one batch, and the rate when files are
    written by threads behind the next batch; a line for each way to run the VQGAN.
    """
    prior = make_sampler(random_model("prior", size), Decoding(top_k=SIZES[size][3]), seed=0, rows=batch)
    decoding = Decoding(top_p=0.8 if kind == "ar" else None)
    pixels = make_sampler(random_model(kind, size), decoding, seed=0, rows=pixel_batch)
    images = torch.arange(batch)
    codes = Pipeline(prior, pixels, random_vqgan("float32")).write(images)
    blocks = codes.vq.split(BLOCK)
    transformers = {
        "prior": seconds(lambda: prior(images)),
        "pixel_decoder": seconds(lambda: pixels(images, prefix=codes.discriminative), times=1),
    }
    threads = min(16, cpu_count() or 1)
    for precision, compiled in PAINTERS:
        pipeline = Pipeline(prior, pixels, random_vqgan(precision, compiled))
        parts = transformers | {"vqgan": seconds(partial(_paint_all, pipeline, blocks), times=1)}
        on_gpu = sum(parts.values())
        pictures = _paint_all(pipeline, blocks)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as writers:
            paths = [Path(folder) / f"{number:06d}.png" for number in range(batch)]
            start = time.perf_counter()
            list(writers.map(write_png, paths, pictures))
            parts["png"] = time.perf_counter() - start
        report(
            measured="pipeline",
            size=size,
            pixel_decoder=kind,
            vqgan=precision,
            vqgan_compiled=compiled,
            batch=batch,
            pixel_batch=pixel_batch,
            png_threads=threads,
            seconds={name: round(value, 2) for name, value in parts.items()},
            share={name: round(value / sum(parts.values()), 3) for name, value in parts.items()},
            images_per_second_one_after_the_other=round(batch / sum(parts.values()), 1),
            images_per_second_files_behind=round(batch / max(on_gpu, parts["png"]), 1),
        )


def _paint_all(pipeline: Pipeline, blocks: list[torch.Tensor]) -> list[np.ndarray]:
    return [picture for block in blocks for picture in pipeline.paint(block)]


def main() -> None:
    """Measure what the command line selects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch", type=int, help="images a batch (default: 1,024 for base, 512 for large and VQGAN)")
    parser.add_argument("--pixel-batch", type=int, default=256, help="images a batch of the pixel decoder")
    parser.add_argument("--pixel-decoders", nargs="+", choices=["ar", "nar"], default=["ar", "nar"])
    parser.add_argument("--vqgan", action="store_true")
    parser.add_argument("--pipeline", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--modern", action="store_true", help="modern layers (of the prior alone)")
    options = parser.parse_args()
    if options.vqgan:
        measure_vqgan(options.batch or 512)
        return
    for size in options.sizes:
        batch = options.batch or SIZES[size][4]
        if not options.pipeline:
            measure_prior(size, batch, options.modern, options.profile)
        else:
            for kind in options.pixel_decoders:
                measure_pipeline(size, kind, batch, options.pixel_batch)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
