"""Twenty kills of each offline stage as a job of two processes, measured against an uninterrupted job.

    python tests/measure_kills.py OUT [--kills 20]

Features, K-Means, tokens and sampling run by their commands over small stand-ins. A job is killed with SIGKILL, its
ranks in random order, once it has got a little further and at a random moment after that; then the same command is
given again. Not part of the test suite, which does the same with fewer kills; training has its twenty there. Prints a
line for each stage and ends with status 1 when a byte differs.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ports import free_port
from preparation_parts import make_codebook, make_encoder, make_images, make_vqgan
from small_models import write_models

HOME = Path(__file__).resolve().parents[1]
RANKS = 2
LONGEST_PAUSE = 0.3
"""Seconds between the progress that is waited for and the kill, at most."""


def main(out: Path, kills: int) -> int:
    """Measure every stage."""
    parts = _parts(out)
    results = []
    for stage, (command, progress) in _stages(parts).items():
        whole, killed = out / stage / "whole", out / stage / "killed"
        for folder in (whole, killed):
            folder.mkdir(parents=True)
        _finish(command(whole), out / stage / "whole.log")
        hits = _kill_often(command(killed), lambda where=killed, look=progress: look(where), kills, out / stage)
        same = _content(killed) == _content(whole)
        results.append(same)
        print(f"{stage}: killed {len(hits)} times, {sum(hits)} of them with work under way; equal: {same}", flush=True)
    return 0 if all(results) else 1


def _parts(out: Path) -> dict[str, Path]:
    images = make_images(out / "images", 400)
    encoder = make_encoder(out / "encoder.pth")
    vqgan, config = make_vqgan(out / "vqgan.ckpt")
    points = np.random.default_rng(0).standard_normal((60_000, 32)).astype(np.float32)
    np.save(out / "points.npy", points)
    parts = {"images": images, "encoder": encoder, "vqgan": vqgan, "config": config, "points": out / "points.npy"}
    return parts | {"codebook": make_codebook(out / "km.npy", encoder), **write_models(out / "models")}


def _stages(parts: dict[str, Path]) -> dict[str, tuple[Callable[[Path], list], Callable[[Path], object]]]:
    """Stage -> its command for an output folder, and something that differs whenever the job got further."""
    encoder = ("--images", parts["images"], "--encoder", parts["encoder"], "--num-heads", 2)
    vqgan = ("--vqgan", parts["vqgan"], "--vqgan-config", parts["config"])
    painter = ("--vqgan", parts["vqgan.ckpt"], "--vqgan-config", parts["vqgan.yaml"])
    models = ("--prior", parts["prior"], "--decoder", parts["nar"], *painter)
    return {
        "features": (
            lambda out: ["features", *encoder, "--block-images", 4, "--workers", 1, "--out", out / "features"],
            lambda out: len(list(out.glob("features/*"))),
        ),
        "K-Means": (
            lambda out: [
                *("kmeans", "--features", parts["points"], "--clusters", 256, "--iterations", 150),
                *("--out", out / "km.npy"),
            ],
            lambda out: _changed(out / "km.run" / "state.npz"),
        ),
        "tokens": (
            lambda out: [
                *("tokenize", *encoder, "--block-images", 1, "--workers", 1, "--codebook", parts["codebook"]),
                *(*vqgan, "--views", 8, "--out", out / "tokens"),
            ],
            lambda out: len(list(out.glob("tokens/block-*"))),
        ),
        "sampling": (
            lambda out: ["sample", *models, "--out", out / "samples", "--count", 2400, "--batch", 16],
            lambda out: len(list(out.glob("samples/parts/*.npz"))),
        ),
    }


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _start(command: list, log: Path) -> list[subprocess.Popen]:
    port = free_port()
    shared = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        return [
            subprocess.Popen(
                [sys.executable, "-m", "digit_ds", *map(str, command)],
                env=environment | {name: str(value) for name, value in (shared | {"RANK": r, "LOCAL_RANK": r}).items()},
                stdout=stream,
                stderr=stream,
            )
            for r in range(RANKS)
        ]


def _finish(command: list, log: Path) -> None:
    statuses = [process.wait() for process in _start(command, log)]
    if statuses != [0] * RANKS:
        raise SystemExit(f"{' '.join(map(str, command))}: ended with {statuses}, see {log}")


def _kill_often(command: list, progress: Callable[[], object], kills: int, folder: Path) -> list[bool]:
    """Whether each kill found all ranks at work; at the end the job is finished."""
    chance, hits = random.Random(0), []
    for attempt in range(kills):
        processes = _start(command, folder / f"{attempt:02d}.log")
        for _ in range(chance.randint(1, 2)):
            before = progress()
            while progress() == before and all(process.poll() is None for process in processes):
                time.sleep(0.002)
        time.sleep(chance.random() * LONGEST_PAUSE)
        hits.append(all(process.poll() is None for process in processes))
        chance.shuffle(processes)
        for process in processes:
            process.kill()
        statuses = [process.wait() for process in processes]
        if any(status not in (0, -9) for status in statuses):
            raise SystemExit(f"attempt {attempt}: a rank ended with {statuses}, see {folder}/{attempt:02d}.log")
    _finish(command, folder / "last.log")
    return hits


def _content(folder: Path) -> dict[str, bytes]:
    """Every file but TensorBoard's, whose names and contents hold times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "tb")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder for everything")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    sys.exit(main(options.out.resolve(), options.kills))
