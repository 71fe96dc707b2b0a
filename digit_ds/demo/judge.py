"""Classifiers that score the demo's pictures, trained on the real training digits alone, with their labels.

The pipeline does not use them; they only score its pictures. A support-vector machine classifies digits by their
histograms of oriented gradients; a small network on grey values, written for ``digit-ds evaluate --features``, gives
the features of FID and the classes of the Inception Score.

python -m digit_ds.demo.judge IMAGES OUT.safetensors
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import Tensor

from digit_ds.data.feature_network import save_feature_network
from digit_ds.demo.digits import read_images, read_labels
from digit_ds.demo.hog import describe
from digit_ds.errors import run_command

SIDE = 16
"""Side in pixels of what the network is given."""
HIDDEN = (128, 64)
"""Widths of the network's hidden layers; the second gives the features."""


class Judge:
    """A support-vector machine that classifies digits.

    Args:
        images: training images [B, 3, H, W] in [0, 1].
        labels: their digits [B].
    """

    def __init__(self, images: Tensor, labels: np.ndarray):
        self._machine = SVC(C=10.0).fit(describe(images).numpy(), labels)

    def predict(self, images: Tensor) -> np.ndarray:
        """Classes of images [B, 3, H, W]: int64 [B]."""
        return self._machine.predict(describe(images).numpy())

    def score(self, images: Tensor, labels: np.ndarray) -> float:
        """Share of the images whose class is that of ``labels``."""
        return float((self.predict(images) == labels).mean())


def train_network(images: Path, out: Path) -> None:
    """Train the network on an image folder and write it as a feature network."""
    grey = F.interpolate(read_images(images).mean(1, keepdim=True), size=(SIDE, SIDE), mode="area").flatten(1).numpy()
    network = MLPClassifier(HIDDEN, random_state=0, max_iter=100, early_stopping=False)
    network.fit(grey, read_labels(images))
    classes = [str(label) for label in network.classes_]
    weights = [torch.from_numpy(weight.T) for weight in network.coefs_]
    biases = [torch.from_numpy(bias) for bias in network.intercepts_]
    save_feature_network(out, weights, biases, side=SIDE, classes=classes)


def main(arguments: list[str]) -> None:
    """Parse the command line and train the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of training images; its folders are the digits")
    parser.add_argument("out", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    train_network(options.images, options.out)


if __name__ == "__main__":
    run_command(main)
