"""Images a second of tokenisation, each figure beside its own ceiling.

    python benchmarks/tokenize_speed.py --out tokenize_speed.json

DINOv2-B, 8,192 centroids and MAGE's VQGAN with random weights (speed does not depend on them); photographs drawn as
noise of natural smoothness, 500 x 375 pixels, JPEG quality 90. "encode": views already on the device. "decode": files
to views on the device, nothing encoded. "end to end": files to token shards through the very pipeline that
tools/tokenize_images.py runs; its ceiling is the slower of the two. The last two count from the first batch on:
starting the workers takes a second or two and is done once.

With a GPU the parts of its decoding stand alone, to show which one limits it: "read" is the workers' share (files,
headers, crops, the way into this process), "nvJPEG" and "views" what the GPU then does with one batch, again and again.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import rate, synchronise
from torch import Tensor

from digit_ds.data.images import Crops
from digit_ds.parallel.launch import device
from digit_ds.preparation.jobs import Job, default_workers
from digit_ds.preparation.loading import Loading
from digit_ds.preparation.pipeline import EncodingPipeline
from digit_ds.preparation.staging import separate_queues
from digit_ds.preparation.tokens import BlockWriter
from digit_ds.tokenizer.codebook import save_codebook
from digit_ds.tokenizer.tokenizer import Tokenizer
from digit_ds.tokenizer.vqgan import MAGE_CONFIG
from digit_ds.tokenizer.vqgan_network import VqganNetwork

SIZE = 256


def random_encoder(path: Path, width: int, depth: int) -> Path:
    """DINOv2 with 4 registers, patches of 14 pixels and a 37 x 37 position table, random weights."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape) * 0.02

    state = {
        "cls_token": draw(1, 1, width),
        "register_tokens": draw(1, 4, width),
        "mask_token": draw(1, width),
        "pos_embed": draw(1, 1 + 37 * 37, width),
        "patch_embed.proj.weight": draw(width, 3, 14, 14),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": torch.ones(width),
        "norm.bias": draw(width),
    }
    shapes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in range(depth):
        for name, (rows, columns) in shapes.items():
            state[f"blocks.{block}.{name}.weight"] = draw(rows * width, columns * width)
            state[f"blocks.{block}.{name}.bias"] = draw(rows * width)
        for name in ("norm1", "norm2"):
            state[f"blocks.{block}.{name}.weight"] = torch.ones(width)
            state[f"blocks.{block}.{name}.bias"] = draw(width)
        for name in ("ls1", "ls2"):
            state[f"blocks.{block}.{name}.gamma"] = torch.ones(width)
    torch.save(state, path)
    return path


def photographs(root: Path, count: int) -> Path:
    """``count`` JPEG files under distinct names; 64 distinct pictures with the spectrum of natural images."""
    generator = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None])
    frequencies[0, 0] = 1
    root.mkdir(parents=True)
    originals = []
    for number in range(min(count, 64)):
        spectrum = np.fft.fft2(generator.standard_normal((3, 375, 500))) / frequencies
        pixels = np.fft.ifft2(spectrum).real
        pixels = (pixels / pixels.std() * 50 + 128).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        path = root / f"{number:06d}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        originals.append(path.read_bytes())
    for number in range(len(originals), count):
        (root / f"{number:06d}.jpg").write_bytes(originals[number % len(originals)])
    print(f"{count} JPEG files of {np.mean([len(data) for data in originals]) / 1024:.0f} KiB on average", flush=True)
    return root


def encode_speed(encode: Callable[[Tensor], object], batch: int, seconds: float) -> float:
    """Images a second with uint8 views already on the device."""
    views = torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8, device=device()).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return batch * rate(lambda: encode(views.float() / 255), seconds)


def decoding_parts(images: Path, loading: Loading, out: Path, seconds: float) -> dict[str, float]:
    """Images a second of each part of decoding on the GPU, run alone."""
    from digit_ds.preparation.gpu_views import cut_views, decode_jpegs

    shutil.rmtree(out, ignore_errors=True)
    job = Job(out, images, {}, 1024)
    batches = loading.batches(job, list(range(job.blocks)))
    next(batches)
    started = time.perf_counter()
    for batch in batches:
        jpegs, windows = [data.clone() for data in batch.data], torch.from_numpy(np.stack(batch.windows))
    read = (job.images - loading.images_per_batch) / (time.perf_counter() - started)
    pixels = decode_jpegs(jpegs, device())
    return {
        "read": read,
        "nvJPEG": len(jpegs) * rate(lambda: decode_jpegs(jpegs, device()), seconds),
        "views": len(jpegs) * rate(lambda: cut_views(pixels, windows, loading.crops.size), seconds),
    }


def first_pixels(pixels: Tensor) -> tuple[Tensor]:
    """Nothing encoded: one number of each view."""
    return (pixels[:, 0, 0, 0],)


def conveyor_speed(
    images: Path, loading: Loading, encode: Callable[[Tensor], tuple], tokenizer: Tokenizer | None, shards: Path
) -> float:
    """Images a second from files, from the first batch on; with ``tokenizer`` the tokens are written as shards."""
    shutil.rmtree(shards, ignore_errors=True)
    job = Job(shards, images, {}, 1024)
    began: list[float] = []

    def timed(pixels: Tensor, _extra: list) -> tuple:
        began.append(time.perf_counter())
        return encode(pixels)

    with BlockWriter(job, tokenizer, loading.crops) if tokenizer else nullcontext(lambda block, encoded: None) as write:
        EncodingPipeline(loading, device(), timed, write).run(job, list(range(job.blocks)), "benchmark")
        synchronise()
    return (job.images - loading.images_per_batch) / (time.perf_counter() - began[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40960, help="JPEG files of the end-to-end runs")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=5, help="time spent on each encode-only figure")
    parser.add_argument("--no-vqgan", action="store_true")
    parser.add_argument("--out", help="JSON file for the figures")
    options = parser.parse_args()

    separate_queues()
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(Path(temporary), options)
    figures["settings"] = vars(options) | {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    if options.out:
        Path(options.out).write_text(json.dumps(figures, indent=2) + "\n")


def measure(root: Path, options: argparse.Namespace) -> dict:
    """All figures, printed as they come."""
    figures: dict[str, float] = {}

    def report(name: str, value: float, ceiling: float | None = None) -> None:
        figures[name] = value
        share = f"  ({value / ceiling:.0%} of {ceiling:.0f})" if ceiling else ""
        print(f"{name:<52}{value:>10.0f} images/s{share}", flush=True)

    torch.manual_seed(0)
    encoder = random_encoder(root / "encoder.pth", options.width, options.depth)
    save_codebook(root / "km.npy", torch.randn(options.codes, options.width), {})
    torch.save(VqganNetwork(MAGE_CONFIG["ddconfig"], MAGE_CONFIG["n_embed"]).state_dict(), root / "vqgan.ckpt")
    images, few = photographs(root / "images", options.images), photographs(root / "few", 2 * options.batch)

    cuda = torch.cuda.is_available()
    crops = Crops("random", SIZE, SIZE, 1, 0)
    decode: dict[str, float] = {}
    loadings = {
        name: Loading(crops, options.batch, options.workers, name) for name in (("gpu", "cpu") if cuda else ("cpu",))
    }
    for name, loading in loadings.items():
        if name == "gpu":  # the first call of nvJPEG is slow
            conveyor_speed(images, loading, first_pixels, None, root / "out")
            for part, speed in decoding_parts(images, loading, root / "out", options.seconds).items():
                report(f"decode, gpu: {part} alone", speed)
        decode[name] = conveyor_speed(images, loading, first_pixels, None, root / "out")
        report(f"decode, {name}", decode[name])

    for with_vqgan in (False, True)[: 1 if options.no_vqgan else 2]:
        tokenizer = Tokenizer(
            encoder,
            root / "km.npy",
            root / "vqgan.ckpt" if with_vqgan else None,
            precision=options.precision,
            compile=cuda and not options.no_compile,
            device=device(),
        )
        if not with_vqgan:
            report("encode, features", encode_speed(tokenizer.encoder, options.batch, options.seconds))
        else:
            report("encode, VQ tokens", encode_speed(tokenizer.vqgan.encode, options.batch, options.seconds))
        kinds = "both kinds of tokens" if with_vqgan else "discriminative tokens"
        encode = encode_speed(tokenizer.encode, options.batch, options.seconds)
        report(f"encode, {kinds}", encode)
        for loading in loadings.values():  # compilation at the first batch is not counted
            conveyor_speed(few, loading, tokenizer.encode, tokenizer, root / "out")
        for name, loading in loadings.items():
            speed = conveyor_speed(images, loading, tokenizer.encode, tokenizer, root / "out")
            report(f"end to end, {kinds}, {name} decoder", speed, min(encode, decode[name]))
    return figures


if __name__ == "__main__":
    main()
