"""Small real parts for the tests of the offline jobs: pictures, a DINOv2-format encoder, a codebook, a VQGAN."""

import faulthandler
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ports import free_port
from tqdm import tqdm

from digit_ds.files import sha256
from digit_ds.publishing.trial import write_encoder, write_vqgan
from digit_ds.tokenizer.codebook import save_codebook

REPOSITORY = Path(__file__).parent.parent
WIDTH, PATCH, TABLE, DEPTH, SIZE = 16, 4, 8, 4, 32


def make_images(
    root: Path, count: int = 20, classes: tuple[str, ...] = ("cat", "dog", "grüne Äpfel"), seed: int = 0
) -> Path:
    """Coloured noise of differing sizes, JPEG and PNG in turn, spread over class folders."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        folder = root / classes[number % len(classes)] if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        blobs = generator.integers(0, 256, (5, 5, 3)).astype(np.uint8)
        size = tuple(map(int, generator.integers(33, 90, 2)))
        picture = Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:03d}.{'png' if number % 2 else 'jpg'}")
    return root


def make_encoder(path: Path, seed: int = 0) -> Path:
    """Random weights in the key layout of dinov2_vitb14_reg4_pretrain.pth, for images of 32 pixels: 8 x 8 patches."""
    write_encoder(path, WIDTH, DEPTH, PATCH, TABLE, seed)
    return path


def make_codebook(path: Path, encoder: Path | None = None, codes: int = 24, width: int = WIDTH) -> Path:
    """Random centroids; with ``encoder`` their provenance says that they were made from its features."""
    centroids = np.random.default_rng(1).standard_normal((codes, width))
    provenance = {"encoder_sha256": sha256(encoder), "layer": 3} if encoder else {}
    save_codebook(path, centroids, provenance)
    return path


def make_vqgan(path: Path, levels: int = 3) -> tuple[Path, Path]:
    """A random VQGAN and its configuration: 2 ** (levels - 1) pixels a token."""
    write_vqgan(path, 32, levels)
    return path, path.with_suffix(".yaml")


def options(**values: object) -> list[str]:
    """Keyword arguments as command-line options."""
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def call(tool: str, *arguments: object) -> int:
    """Run a tool's command line in this process and return its exit status: no seconds of imports."""
    given, sys.argv = sys.argv, [f"{tool}.py", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "tools" / f"{tool}.py"), run_name="__main__")
    finally:
        sys.argv = given
    return ended.value.code or 0


def command(tool: str, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a tool as a user does: alone, or under torchrun with several processes."""
    script = [str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by its relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def start_ranks(world: int, work: Callable[[], None]) -> list[multiprocessing.Process]:
    """Start ``work`` in ``world`` forked processes that form one job on gloo, as torchrun would."""
    port = free_port()

    def enter(rank: int) -> None:
        faulthandler.dump_traceback_later(100)  # before those who wait for it give up
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        tqdm.set_lock(threading.RLock())  # the shared one would stay locked for ever when its holder is killed
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        work()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=enter, args=(rank,)) for rank in range(world)]
    # What earlier tests left must not be finalised in the children: they lack its threads and files.
    gc.collect()
    gc.freeze()
    for process in processes:
        process.start()
    gc.unfreeze()
    return processes


def run_ranks(world: int, work: Callable[[], None]) -> None:
    """Run ``work`` in ``world`` processes and assert that all exit with status 0."""
    processes = start_ranks(world, work)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world
