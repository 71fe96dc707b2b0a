"""Small weights that every rank keeps under ZeRO 3, up to ``stage3_param_persistence_threshold``: biases and norms.

DeepSpeed frees each of them before an update and joins it again from the parts of all ranks after it, while the GPU has
nothing to do. Here their memory is allocated once, and one message and one copy bring all of them up to date.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 128
"""Elements. Compiled layers assume that a parameter stays as aligned as it was when they were compiled."""


class KeptWeights:
    """Whole weights of parameters that are cut over the ranks of a group."""

    def __init__(
        self,
        parts: Sequence[Tensor],
        shapes: Sequence[Sequence[int]],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """``parts``: this rank's part [P] of each parameter, live, on ``device`` or offloaded to the host.

        ``shapes`` are those of the whole parameters. Rank ``r`` holds elements ``r * P`` to ``(r + 1) * P`` of the
        flattened parameter; the last parts are padded.
        """
        self._parts, self._group = list(parts), group
        ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        lengths, sizes = [part.numel() for part in parts], [math.prod(shape) for shape in shapes]
        places, starts = _places(sizes, lengths)
        self._rows = parts[0].new_empty(ranks, sum(lengths), device=device)
        self._places = places.to(device)
        self._flat = flat = parts[0].new_empty(len(places), device=device)
        self.whole = [
            flat[start : start + size].view(shape) for start, size, shape in zip(starts, sizes, shapes, strict=True)
        ]
        """The whole weights; without values until the first :meth:`gather`."""

    @torch.no_grad()
    def gather(self) -> None:
        """Bring :attr:`whole` up to what the ranks' parts are now. Every rank calls it."""
        row, rows = self._rows[self._rank], self._rows.view(-1)
        row.copy_(torch.cat(self._parts))
        if len(self._rows) > 1:
            dist.all_gather_into_tensor(rows, row, group=self._group)
        torch.index_select(rows, 0, self._places, out=self._flat)


def _places(sizes: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Where among the ranks' rows each element of the whole weights is, int32; the first element of each parameter.

    Elements between two parameters have no meaning.
    """
    row, before, first, starts, found = sum(lengths), 0, 0, [], []
    for size, length in zip(sizes, lengths, strict=True):
        element = torch.arange(-(-size // ALIGNMENT) * ALIGNMENT, dtype=torch.int32).clamp_(max=size - 1)
        found.append(element // length * row + before + element % length)
        starts.append(first)
        before, first = before + length, first + len(element)
    return torch.cat(found), starts
