"""Dropout whose mask is computed from the place of each element instead of drawn one after the other.

Whether an element is kept is a function of a key, its row and its column. So every parallel layout has the same masks,
compiled or not; a rank computes those of its own rows alone; and the backward pass can compute a mask again instead of
keeping it. Generators of PyTorch have none of this: what ``torch.compile`` draws differs from what it replaces, and it
draws a mask of all rows before a part can be taken.

The hash is ``lowbias32`` of Chris Wellons' hash-prospector, applied to the keyed row and to that plus the column.
"""

import torch
from torch import Tensor

_COLUMN = 0x9E3779B9 - 2**32  # odd, near 2^32 / golden ratio: neighbouring columns differ in all bits
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - 2**32


def draw_keys(masks: int, device: torch.device) -> Tensor:
    """Keys of so many masks from the CPU's default generator -> int32 [masks, 2] on ``device``."""
    return torch.randint(-(2**31), 2**31, (masks, 2), dtype=torch.int32).to(device, non_blocking=True)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _hash(x: Tensor) -> Tensor:
    """``lowbias32`` of int32 numbers, a permutation of them; products wrap."""
    x = (x ^ _shifted(x, 16)) * _FIRST
    x = (x ^ _shifted(x, 15)) * _SECOND
    return x ^ _shifted(x, 16)


def keep_mask(key: Tensor, rows: int, columns: int, first_row: int, share: float) -> Tensor:
    """Which elements of rows ``first_row`` and following are kept -> bool [rows, columns].

    Args:
        key: int32 [2].
        share: of the elements that are dropped, in [0, 1).
    """
    row = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=key.device).unsqueeze(1)
    column = torch.arange(columns, dtype=torch.int32, device=key.device)
    place = (_hash(row ^ key[0]) ^ key[1]) + column * _COLUMN
    return _hash(place) >= round(share * 2**32) - 2**31


def dropout(x: Tensor, share: float, key: Tensor, first_row: int = 0) -> Tensor:
    """``x`` [rows, columns] with a share of its elements set to 0 and the others divided by 1 - share."""
    kept = keep_mask(key, x.shape[0], x.shape[1], first_row, share)
    return torch.where(kept, x * (1.0 / (1.0 - share)), 0.0)
