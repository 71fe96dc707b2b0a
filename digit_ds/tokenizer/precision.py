"""Arithmetic of the frozen networks: names of dtypes, and float32 without TF32 on a GPU."""

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
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]  # missing in the stubs
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "ieee"
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.fp32_precision = value


def precision_dtype(precision: str) -> torch.dtype:
    """``fp64``, ``fp32``, ``bf16`` or ``fp16`` as a torch dtype."""
    return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
