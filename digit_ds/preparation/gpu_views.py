"""JPEG decoding, resizing and cutting on a GPU: what ``Crops.cut`` does on the CPU, for many images at a time.

All views of a batch are cut by two kernels, whatever the sizes of its images: first across, then down, with the
weights of Pillow's bicubic filter and its rounding to whole pixel values between the two. Legend: `N` images, `V` views
of each, `S` side of a view, `H`, `W` sides of an image.
"""

import warnings
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

ROWS = 8
"""Rows that one program of a kernel works on."""


def decode_views(jpegs: Sequence[Tensor], windows: Tensor, size: int, device: torch.device) -> Tensor:
    """Views of JPEG images (1-D uint8 tensors of their bytes): uint8 [N, V, 3, S, S] on the GPU ``device``.

    Args:
        jpegs: N files, read before this returns.
        windows: float32 [N, V, 5] of ``Crops.windows``, in host memory.
        size: S.
        device: a CUDA device.

    Raises:
        RuntimeError: some image cannot be decoded; the library does not tell which.
    """
    # The decoder writes in a stream of its own to memory that this stream's last kernels may still be reading.
    torch.cuda.current_stream(device).synchronize()
    return cut_views(decode_jpegs(jpegs, device), windows, size)


def decode_jpegs(jpegs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Pixels of JPEG files, uint8 [3, H, W] each, by nvJPEG; waits for the GPU, but not with Python's lock held."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode_jpeg(list(jpegs), mode=ImageReadMode.RGB, device=device)


def cut_views(images: Sequence[Tensor], windows: Tensor, size: int) -> Tensor:
    """Cut and scale images, uint8 [3, H, W] of any sizes: uint8 [N, V, 3, S, S], channels last in memory.

    ``windows`` are the float32 [N, V, 5] of ``Crops.windows``, in host memory. Nothing waits for the GPU.
    """
    images = [image.contiguous() for image in images]
    device, views = images[0].device, windows.shape[1]
    heights = [image.shape[1] for image in images]
    ends = list(accumulate(3 * views * height for height in heights))
    # Of each image: where its pixels are, its sides, its first row among the strips.
    table = torch.tensor(
        [(image.data_ptr(), *image.shape[1:], end) for image, end in zip(images, [0, *ends])], dtype=torch.int64
    )
    table, windows = _sent(table, device), _sent(windows, device)
    strips = torch.empty(ends[-1], size, dtype=torch.uint8, device=device)  # [views, 3, H, S] of each image in turn
    cut = torch.empty(len(images), views, size, size, 3, dtype=torch.uint8, device=device)
    cuts, columns = len(images) * views, triton.next_power_of_2(size)
    _across[(cuts, triton.cdiv(max(heights), ROWS))](table, windows, strips, views, size, columns, ROWS)
    _down[(cuts, triton.cdiv(size, ROWS))](table, windows, strips, cut, views, size, columns, ROWS)
    return cut.movedim(-1, 2)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def _weight(distance):
    """The cubic filter (a = -0.5) at ``distance`` pixels."""
    x = tl.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def _level(value):
    """The nearest whole pixel value."""
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _across(
    table, windows, strips, views, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Scale ``ROWS`` rows of an image to the columns of one view: [3, H, W] -> [3, H, S].

    Target pixel i covers the source from start + i step to start + (i + 1) step. The filter is widened by the step
    where it shrinks; pixels past the image's sides count nothing.
    """
    cut = tl.program_id(0)
    image = table + 4 * (cut // views)
    pixels = tl.load(image).to(tl.pointer_type(tl.uint8))
    height, width = tl.load(image + 1).to(tl.int32), tl.load(image + 2).to(tl.int32)
    strip = strips + (tl.load(image + 3) + (cut % views) * 3 * height) * SIZE
    start, step = tl.load(windows + 5 * cut), tl.load(windows + 5 * cut + 1)
    top, step_y = tl.load(windows + 5 * cut + 2), tl.load(windows + 5 * cut + 3)
    mirrored = tl.load(windows + 5 * cut + 4)
    first_row = tl.program_id(1) * ROWS
    reach = 2 * tl.maximum(step_y, 1.0)  # of the filter that goes down afterwards
    wanted = (first_row + ROWS > top - reach) & (first_row < top + SIZE * step_y + reach)
    if wanted & (first_row < height):
        rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        target = tl.where(mirrored > 0, SIZE - 1 - columns, columns)
        centre = start + (target + 0.5) * step  # [S]
        scale = tl.maximum(step, 1.0)
        nearest = tl.floor(centre - 2 * scale).to(tl.int32)
        red = tl.zeros([ROWS, COLUMNS], tl.float32)
        green, blue = red, red
        total = tl.zeros([COLUMNS], tl.float32)
        for tap in range(tl.ceil(4 * scale).to(tl.int32) + 1):
            source = nearest + tap
            inside = (source >= 0) & (source < width)
            weight = tl.where(inside, _weight((source + 0.5 - centre) / scale), 0.0)
            place = pixels + rows[:, None] * width + source[None, :]
            known = (rows < height)[:, None] & inside[None, :]
            total += weight
            red += weight[None, :] * tl.load(place, known, 0).to(tl.float32)
            green += weight[None, :] * tl.load(place + height * width, known, 0).to(tl.float32)
            blue += weight[None, :] * tl.load(place + 2 * height * width, known, 0).to(tl.float32)
        place = strip + rows[:, None] * SIZE + columns[None, :]
        known = (rows < height)[:, None] & (columns < SIZE)[None, :]
        tl.store(place, _level(red / total[None, :]), known)
        tl.store(place + height * SIZE, _level(green / total[None, :]), known)
        tl.store(place + 2 * height * SIZE, _level(blue / total[None, :]), known)


@triton.jit
def _down(
    table, windows, strips, cuts, views, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Scale what ``_across`` made to ``ROWS`` rows of one view: [3, H, S] -> [S, S, 3]."""
    cut = tl.program_id(0)
    image = table + 4 * (cut // views)
    height = tl.load(image + 1).to(tl.int32)
    strip = strips + (tl.load(image + 3) + (cut % views) * 3 * height) * SIZE
    start, step = tl.load(windows + 5 * cut + 2), tl.load(windows + 5 * cut + 3)
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    centre = start + (rows + 0.5) * step  # [ROWS]
    scale = tl.maximum(step, 1.0)
    nearest = tl.floor(centre - 2 * scale).to(tl.int32)
    red = tl.zeros([ROWS, COLUMNS], tl.float32)
    green, blue = red, red
    total = tl.zeros([ROWS], tl.float32)
    for tap in range(tl.ceil(4 * scale).to(tl.int32) + 1):
        source = nearest + tap
        weight = _weight((source + 0.5 - centre) / scale)
        weight = tl.where((source >= 0) & (source < height), weight, 0.0)
        place = strip + source[:, None] * SIZE + columns[None, :]
        known = ((weight != 0) & (rows < SIZE))[:, None] & (columns < SIZE)[None, :]
        total += weight
        red += weight[:, None] * tl.load(place, known, 0).to(tl.float32)
        green += weight[:, None] * tl.load(place + height * SIZE, known, 0).to(tl.float32)
        blue += weight[:, None] * tl.load(place + 2 * height * SIZE, known, 0).to(tl.float32)
    place = cuts + ((cut.to(tl.int64) * SIZE + rows[:, None]) * SIZE + columns[None, :]) * 3
    known = (rows < SIZE)[:, None] & (columns < SIZE)[None, :]
    tl.store(place, _level(red / total[:, None]), known)
    tl.store(place + 1, _level(green / total[:, None]), known)
    tl.store(place + 2, _level(blue / total[:, None]), known)
