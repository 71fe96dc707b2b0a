"""The kernels that cut views on a GPU, in Triton's interpreter, which needs none: they give Pillow's views."""

from triton_interpreter import interpret

SCRIPT = """
import numpy as np
import torch
from PIL import Image
from digit_ds.data.images import Crops
from digit_ds.preparation.gpu_views import cut_views

random = np.random.default_rng(0)
noise = [Image.fromarray(random.integers(64, 192, (height, width, 3)).astype(np.uint8)) for width, height in
         [(60, 36), (16, 17)]]
blobs = Image.fromarray(random.integers(0, 256, (5, 4, 3)).astype(np.uint8))
smooth = blobs.resize((22, 70), Image.Resampling.BICUBIC)
for kind, size, resize, views in (("random", 14, 20, 2), ("random-resized-crop", 16, 16, 2)):
    crops, images = Crops(kind, size, resize, views, 3), [*noise, smooth]
    windows = torch.from_numpy(np.stack([crops.windows(image.size, str(n)) for n, image in enumerate(images)]))
    assert 0 < windows[..., 4].mean() < 1  # some are mirrored
    pixels = [torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()) for image in images]
    ours = cut_views(pixels, windows, size)
    assert ours.shape == (3, views, 3, size, size)
    expected = np.stack([crops.cut(image, str(n)) for n, image in enumerate(images)])
    difference = np.abs(ours.permute(0, 1, 3, 4, 2).numpy().astype(int) - expected)
    # Pillow goes down before it goes across where that costs less, and rounds in between.
    assert (difference.max(axis=(1, 2, 3, 4)) <= 1).all(), (kind, difference.max(axis=(1, 2, 3, 4)))
    assert difference.mean() < 0.15, (kind, difference.mean())
print("equal")
"""


def test_kernels_in_the_interpreter():
    interpret(SCRIPT)
