"""Judges of the demo's pictures: classifiers trained on the real training digits alone, with their labels.

The pipeline's models never see them; they only score what it made. A support-vector machine names digits; a small
network, written for ``digit-ds evaluate --features``, gives the features of FID and the classes of the Inception Score.

python -m digit_ds.demo.judge IMAGES OUT.safetensors --steps N
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.svm import SVC
from torch import Tensor, nn

from digit_ds.demo.digits import SIZE, read_images, read_labels
from digit_ds.demo.fitting import distort, fit
from digit_ds.errors import run_command
from digit_ds.files import write_atomically

SOURCE_SIZE = 8
"""Side of scikit-learn's originals, at which the support-vector machine looks at a picture."""
BATCH = 64
WIDTHS = (3 * SIZE * SIZE, 128, 64, 10)
"""Pixels, two hidden layers (the second gives the features), classes."""


def as_originals(images: Tensor) -> np.ndarray:
    """Images [B, 3, 32, 32] in [0, 1] -> grey values of 8x8 pixels, float32 [B, 64]."""
    grey = images.clamp(0, 1).mean(1, keepdim=True)
    return F.avg_pool2d(grey, SIZE // SOURCE_SIZE).flatten(1).numpy()


def train_judge(images: Tensor, labels: np.ndarray) -> SVC:
    """A support-vector machine that names digits; score it with ``judge.score(as_originals(images), labels)``."""
    return SVC(C=10.0).fit(as_originals(images), labels)


class Network(nn.Module):
    """A perceptron on pixels: [B, 3, 32, 32] in [0, 1] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in zip(WIDTHS, WIDTHS[1:]))

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def train_network(images: Path, out: Path, steps: int) -> None:
    """Train the network on an image folder and write it as a feature network."""
    torch.manual_seed(2)
    pixels, labels = read_images(images), torch.from_numpy(read_labels(images))
    network = Network()

    def loss(_share: float) -> Tensor:
        chosen = torch.randint(len(labels), (BATCH,))
        views = distort(pixels[chosen], turn=0.1, stretch=0.05, move=1)
        return F.cross_entropy(network(views), labels[chosen])

    unfinished = out.with_name(f"{out.name}.unfinished")
    fit(
        network,
        loss,
        steps=steps,
        learning_rate=2e-3,
        weight_decay=0.01,
        unfinished=unfinished,
        description="judge",
    )
    state = network.state_dict()
    write_atomically(out, lambda path: save_file(state, path))
    unfinished.unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    """Parse the command line and train the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of training images; its folders are the digits")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args(arguments)
    train_network(options.images, options.out, options.steps)


if __name__ == "__main__":
    run_command(main)
