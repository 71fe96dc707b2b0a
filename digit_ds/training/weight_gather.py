"""Updated weights of ZeRO 2 that are sent while the next forward pass computes.

DeepSpeed cuts and gathers each of an optimizer's parameter groups by itself. Here a group is some consecutive modules
in the order of the forward pass. After an update the gathers of all groups begin at once, and a module waits for those
of its own parameters, on a GPU in the device's queue. The file's ``allgather_bucket_size`` is what each rank sends in a
gather: with more ranks there are fewer and larger gathers, since a ring's latency grows with its ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch.distributed as dist
from torch import nn

from digit_ds.model.megatron import MegatronTransformer
from digit_ds.training.zero_messages import consecutive


def modules_in_order(model: MegatronTransformer) -> Iterator[nn.Module]:
    """The modules that a forward pass calls one after the other; together they have every parameter once."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else [child]


class WeightGather:
    """The gathers that are under way. Every rank calls every method in the same order."""

    def __init__(self, model: MegatronTransformer, limit: int) -> None:
        """``limit``: elements of a group; a larger module is a group."""
        modules = list(modules_in_order(model))
        groups = consecutive((sum(p.numel() for p in module.parameters()) for module in modules), limit)
        self.groups = [[p for number in group for p in modules[number].parameters()] for group in groups]
        """Parameters by group, for the optimizer."""
        self._works: dict[int, dist.Work] = {}
        for number, group in enumerate(groups):
            for at in group:
                modules[at].register_forward_pre_hook(partial(self._before, number))

    def begin(self, works: Iterable[dist.Work | None]) -> None:
        """``works``: the gather of each group, begun in their order."""
        self._works = {number: work for number, work in enumerate(works) if work is not None}

    def wait(self) -> None:
        """For all groups: before weights are read outside of a forward pass, or changed."""
        for number in list(self._works):
            self._works.pop(number).wait()

    def _before(self, number: int, module: nn.Module, inputs: Sequence[object]) -> None:
        if (work := self._works.pop(number, None)) is not None:
            work.wait()
