"""Judges of the demo's pictures: classifiers trained on the real training digits alone, with their labels.

The pipeline's models never see them; they only score what it made.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from digit_ds.demo.digits import SIZE

SOURCE_SIZE = 8
"""Side of scikit-learn's originals, at which the judge looks at a picture."""


def as_originals(images: Tensor) -> np.ndarray:
    """Images [B, 3, 32, 32] in [0, 1] -> grey values of 8x8 pixels, float32 [B, 64]."""
    grey = images.clamp(0, 1).mean(1, keepdim=True)
    return F.avg_pool2d(grey, SIZE // SOURCE_SIZE).flatten(1).numpy()


def train_judge(images: Tensor, labels: np.ndarray) -> SVC:
    """A support-vector machine that names digits; score it with ``judge.score(as_originals(images), labels)``."""
    return SVC(C=10.0).fit(as_originals(images), labels)
