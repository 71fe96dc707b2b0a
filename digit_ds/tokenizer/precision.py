"""float32 that means float32: products on a GPU without TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def without_tf32(operand: Tensor) -> Iterator[None]:
    """Keep TF32 out of matrix products and convolutions of ``operand``'s kind, whatever the process-wide settings say.

    PyTorch allows TF32 in convolutions by default. Its ten mantissa bits change features in the third digit and with
    them tokens, while published tokens are float32's. Nothing happens unless ``operand`` is float32 on a GPU.
    """
    if not operand.is_cuda or operand.dtype != torch.float32:
        yield
        return
    # The flags of the older interface (allow_tf32) must not be read here: PyTorch raises when both were used.
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "ieee"
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.fp32_precision = value
