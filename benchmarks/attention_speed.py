"""Bandwidth of the decoding kernel (``model/fused_cache.py``) for different launches, beside PyTorch's attention.

    python benchmarks/attention_speed.py

One line of JSON for each head width (64: base at 1,024 images, 96: large at 512; 16 heads both), number of cached
tokens and launch: microseconds a call, and how fast the part of the cache that matters is read.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor
from torch.nn import functional

from digit_ds.model.fused_cache import Launch, append_and_attend

HEADS, LENGTH, SEEN = 16, 256, (32, 128, 255)
CUTS = [(16, 1), (32, 1), (64, 1), (32, 2), (64, 2), (64, 4)]
LAUNCHES = [Launch(block, warps, stages) for block, warps in CUTS for stages in (1, 2, 3)]


def ways(width: int, batch: int, seen: int) -> dict[str, Callable[[], Tensor]]:
    """PyTorch's attention over the filled part, and the kernel with each launch."""
    qkv = torch.randn(batch, 1, 3 * HEADS * width, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, batch, HEADS, LENGTH, width, device="cuda", dtype=torch.bfloat16)
    query = qkv.view(batch, HEADS, 3, width)[:, :, :1]
    plain = partial(functional.scaled_dot_product_attention, query, keys[:, :, :seen], values[:, :, :seen])
    position = torch.tensor([seen], device="cuda")
    ours = {str(tuple(launch)): partial(append_and_attend, qkv, keys, values, position, launch) for launch in LAUNCHES}
    return {"torch": plain, **ours}


def main() -> None:
    """Measure and print."""
    for width, batch in ((64, 1024), (96, 512)):
        total = defaultdict(float)
        for seen in SEEN:
            for name, way in ways(width, batch, seen).items():
                milliseconds = triton.testing.do_bench(way, warmup=5, rep=25)
                total[name] += milliseconds
                rate = 4 * batch * HEADS * seen * width / milliseconds / 1e9
                line = {"width": width, "seen": seen, "launch": name, "microseconds": round(1000 * milliseconds, 1)}
                print(json.dumps({**line, "terabytes_per_second": round(rate, 2)}), flush=True)
        print(json.dumps({"width": width, "best": sorted(total, key=total.get)[:5]}), flush=True)


if __name__ == "__main__":
    main()
