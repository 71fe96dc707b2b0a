"""scikit-learn's handwritten digits (1,797 real images of 8x8 pixels, 10 classes) as an image folder.

OUT/train/{0..9}/0000.png and OUT/val/{0..9}/0000.png, RGB; a file's number is the image's in scikit-learn's order.

python -m digit_ds.demo.digits OUT
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from digit_ds.data.images import decode, walk
from digit_ds.errors import run_command

SIZE = 32
"""Side of the written images in pixels."""
HELD_OUT = 360
"""Images of ``val``, drawn in equal shares from the classes."""


def write_digits(out: Path) -> None:
    """Write both halves to the new folder ``out``; it appears complete or not at all."""
    if out.exists():  # a run that was killed right after this
        return
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, held_out = train_test_split(numbers, test_size=HELD_OUT, stratify=digits.target, random_state=0)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for split, chosen in (("train", train), ("val", held_out)):
            for number in chosen:
                grey = Image.fromarray(np.round(digits.images[number] * (255 / 16)).astype(np.uint8))
                image = grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
                folder = temporary / split / str(digits.target[number])
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{number:04d}.png")
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    write_digits(parser.parse_args(arguments).out)


if __name__ == "__main__":
    run_command(main)
