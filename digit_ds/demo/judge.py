"""Classifiers that score the demo's pictures, trained on the real training digits alone, with their labels.

The pipeline does not use them; they only score its pictures. A support-vector machine classifies digits; a small
network, written for ``digit-ds evaluate --features``, gives the features of FID and the classes of the Inception Score.
Both read grey values of 8x8 pixels, the size of scikit-learn's originals.

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
from digit_ds.errors import run_command

SIDE = 8
HIDDEN = (128, 64)
"""Widths of the network's hidden layers; the second gives the features."""


def as_originals(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [0, 1] -> grey values of 8x8 pixels, float32 [B, 64]."""
    grey = images.clamp(0, 1).mean(1, keepdim=True)
    return F.interpolate(grey, size=(SIDE, SIDE), mode="area").flatten(1).numpy()


def train_judge(images: Tensor, labels: np.ndarray) -> SVC:
    """A support-vector machine that classifies digits; score it with ``judge.score(as_originals(images), labels)``."""
    return SVC(C=10.0).fit(as_originals(images), labels)


def train_network(images: Path, out: Path) -> None:
    """Train the network on an image folder and write it as a feature network."""
    network = MLPClassifier(HIDDEN, random_state=0, max_iter=100, early_stopping=False)
    network.fit(as_originals(read_images(images)), read_labels(images))
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
