"""A set of handwritten digits as an image folder: 10 classes, RGB, 32 x 32 pixels.

OUT/train/{0..9}/0000.png and OUT/val/{0..9}/0000.png; a file's number is the image's in the order of the set. With
``--copies N``, N randomly turned, stretched, slanted and moved copies of each training image as well:
OUT/copies/{0..9}/0000_0.png and so on.

python -m digit_ds.demo.digits OUT [--set mnist] [--copies N]
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor

from digit_ds.data.images import decode, walk
from digit_ds.demo.fitting import distort
from digit_ds.demo.picture_sets import SETS
from digit_ds.errors import run_command


def write_digits(out: Path, name: str = "digits", copies: int = 0) -> None:
    """Write both halves of the set ``name`` to the new folder ``out``; it appears complete or not at all."""
    if out.exists():  # a run that was killed right after this
        return
    grey, labels = SETS[name].read()
    numbers = np.arange(len(labels))
    train, held_out = train_test_split(numbers, test_size=SETS[name].held_out, stratify=labels, random_state=0)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for split, chosen in (("train", train), ("val", held_out)):
            for number in chosen:
                folder = temporary / split / str(labels[number])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(grey[number]).convert("RGB").save(folder / f"{number:04d}.png")
        if copies:
            _write_copies(temporary, copies)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_copies(out: Path, copies: int) -> None:
    torch.manual_seed(0)
    images, names = read_images(out / "train"), list(walk(out / "train"))
    for copy in range(copies):
        distorted = distort(images, turn=0.12, stretch=0.08, move=1)
        pixels = distorted.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        for name, one in zip(names, pixels, strict=True):
            path = out / "copies" / f"{name.removesuffix('.png')}_{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(one).save(path)


def read_images(folder: Path) -> Tensor:
    """All images below ``folder`` in the order of their names: float [B, 3, H, W] in [0, 1]."""
    pixels = np.stack([np.asarray(decode(folder / name)) for name in walk(folder)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def read_labels(folder: Path) -> np.ndarray:
    """The digit of each image of :func:`read_images`: int64 [B]."""
    return np.array([int(name.split("/")[0]) for name in walk(folder)])


def main(arguments: list[str]) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--set", choices=SETS, default="digits", help="which digits (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=0, help="distorted copies of each training image (default: 0)")
    options = parser.parse_args(arguments)
    write_digits(options.out, options.set, options.copies)


if __name__ == "__main__":
    run_command(main)
