"""JPEG decoding, resizing and cropping on a GPU: what ``Crops.cut`` does on the CPU, for many images at a time.

Resizing is two batched matrix products, with the weights that Pillow's bicubic filter would use. Shapes: `N` images,
`V` views of each, `S` side of a view, `H`, `W` sides of the largest image.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

TOGETHER = 32
"""Images padded to one size: sorted by size first, so that little is wasted."""


def decode_views(jpegs: Sequence[Tensor], windows: Tensor, size: int, device: torch.device) -> Tensor:
    """Views of JPEG images (1-D uint8 tensors of their bytes): uint8 [N, V, 3, S, S] on the GPU ``device``.

    Args:
        jpegs: N files.
        windows: float32 [N, V, 5] of ``Crops.windows``, in host memory.
        size: S.
        device: a CUDA device.

    Raises:
        RuntimeError: some image cannot be decoded; nothing says which.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = decode_jpeg(list(jpegs), mode=ImageReadMode.RGB, device=device)
    views = torch.empty(len(decoded), windows.shape[1], 3, size, size, dtype=torch.uint8, device=device)
    order = sorted(range(len(decoded)), key=lambda number: decoded[number].numel())
    for first in range(0, len(order), TOGETHER):
        chosen = order[first : first + TOGETHER]
        images = [decoded[number] for number in chosen]
        sides = torch.tensor([image.shape[1:] for image in images])  # [N, 2]
        height, width = sides.amax(0).tolist()
        padded = torch.zeros(len(images), 3, height, width, dtype=torch.float16, device=device)
        for target, image in zip(padded, images):
            target[:, : image.shape[1], : image.shape[2]].copy_(image)
        # One copy to the device for all that describes these images.
        described = torch.cat([windows[chosen].flatten(1), sides, torch.tensor(chosen)[:, None]], 1).pin_memory()
        described = described.to(device, non_blocking=True)
        cut = resample(padded, described[:, -3:-1], described[:, :-3].unflatten(1, windows.shape[1:]), size)
        views[described[:, -1].long()] = cut
    return views


def resample(images: Tensor, sides: Tensor, windows: Tensor, size: int) -> Tensor:
    """Cut and scale: floating-point images 0..255 [N, 3, H, W], padded right and below -> uint8 [N, V, 3, S, S].

    ``sides`` [N, 2] are the images' own heights and widths, ``windows`` float32 [N, V, 5] those of ``Crops.windows``.
    """
    count, _, height, width = images.shape
    views = []
    for left, step_x, top, step_y, mirrored in windows.permute(1, 2, 0):
        across = _weights(left, step_x, mirrored, sides[:, 1], width, size).to(images.dtype)  # [N, S, W]
        down = _weights(top, step_y, torch.zeros_like(mirrored), sides[:, 0], height, size).to(images.dtype)
        # Pillow, too, rounds to whole pixel values between the two passes.
        rows = torch.bmm(images.view(count, 3 * height, width), across.mT).round_().clamp_(0, 255)  # [N, 3 H, S]
        view = down[:, None] @ rows.view(count, 3, height, size)  # [N, 3, S, S]
        views.append(view.round_().clamp_(0, 255).to(torch.uint8))
    return torch.stack(views, 1)


def _weights(start: Tensor, step: Tensor, mirrored: Tensor, sides: Tensor, length: int, size: int) -> Tensor:
    """How much of each of ``length`` source pixels goes into each of ``size`` pixels: [N, size, length].

    ``start`` and ``step`` [N]: target pixel i covers the source from start + i step to start + (i + 1) step. The cubic
    filter (a = -0.5) is widened by the step where it shrinks; pixels past the image's own side count nothing.
    """
    target = torch.arange(size, device=start.device, dtype=torch.float32)
    target = torch.where(mirrored[:, None] > 0, size - 1 - target, target)  # [N, S]
    centre = start[:, None] + (target + 0.5) * step[:, None]  # [N, S]
    source = torch.arange(length, device=start.device, dtype=torch.float32)
    x = (source + 0.5 - centre[..., None]).abs_() / step.clamp(min=1)[:, None, None]  # [N, S, L]
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    weights = weights * (source < sides[:, None, None])
    return weights / weights.sum(-1, keepdim=True)
