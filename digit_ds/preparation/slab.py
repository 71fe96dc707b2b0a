"""Memory through which worker processes hand over what they loaded: no file descriptor and no copy for each piece."""

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Size, Tensor

Place = tuple[int, Size] | np.ndarray
"""Where a tensor lies in its slot and its shape; or its values, where its slot had no room for it. They go through a
pipe: a tensor would go through /dev/shm."""


class Slab:
    """``slots`` slots of ``slot_bytes`` bytes, shared with all processes that are forked later.

    Item i belongs into slot i modulo ``slots``: whoever writes it must know that item i - ``slots`` is not needed any
    more. The memory is anonymous, so the size of /dev/shm does not limit it, and nothing is left behind by a kill.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._memory = np.frombuffer(mmap.mmap(-1, slots * slot_bytes), np.uint8).reshape(slots, slot_bytes)

    def put(self, item: int, tensors: Sequence[Tensor]) -> list[Place]:
        """Copy uint8 tensors into the item's slot; what it has no room for stays outside."""
        slot, end = self._memory[item % len(self._memory)], 0
        places: list[Place] = []
        for tensor in tensors:
            begin = end
            if begin + tensor.numel() > len(slot):
                places.append(tensor.numpy())
                continue
            end += tensor.numel()
            slot[begin:end] = tensor.numpy().ravel()
            places.append((begin, tensor.shape))
        return places

    def get(self, item: int, places: Sequence[Place]) -> list[Tensor]:
        """The tensors of an item, in its slot's memory: to be used before the slot's next item is written."""
        slot = torch.from_numpy(self._memory[item % len(self._memory)])
        return [
            torch.from_numpy(place)
            if isinstance(place, np.ndarray)
            else slot[place[0] : place[0] + place[1].numel()].view(place[1])
            for place in places
        ]
