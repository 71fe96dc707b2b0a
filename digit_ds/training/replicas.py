"""Parameters that every tensor-parallel rank holds whole: watched for drift, and repaired.

LayerNorms, biases of row-parallel layers and position tables are updated on each tensor-parallel rank by itself, from
gradients that are equal but for the order of a sum. Where an update comes out different on one rank, nothing brings the
copies together again. So every ``EVERY`` steps the bits of their weights, moments and moving averages are summed on the
device. The sums go to the host while the next step runs, and to the other ranks in that step's exchange.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from digit_ds.model.weights import parameters
from digit_ds.parallel.frameworks import parallel_state
from digit_ds.training.engine import Engine
from digit_ds.training.metrics import warn

EVERY = 100
"""Steps between two comparisons."""
PIECE = 1 << 20
"""Elements that are hashed or sent at a time."""
_MASK = 2**40 - 1
"""A hash is cut to 40 bits, so that a sum over ranks stays in 64."""


class ReplicaCheck:
    """Compares the copies once in a while; every rank calls every method in every step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names = {p.name for p in parameters(engine.model.spec) if p.split_dim is None}
        self._hash: Tensor | None = None  # on its way to the host
        self._event: torch.cuda.Event | None = None

    def note(self, step: int) -> None:
        """After an update: begin to hash, if this is a step for it."""
        topology = self._engine.topology
        if topology.tensor_size == 1 or step % EVERY:
            return
        total = torch.zeros((), dtype=torch.int64, device=self._engine.device)
        number = 0
        for fragment in self._engine.fragments():
            if fragment.name not in self._names:
                continue
            for tensor in fragment.tensors.values():
                number += 1
                for piece in _pieces(tensor):
                    bits = piece.view(torch.int32).to(self._engine.device).long()
                    # Products wrap around, equally everywhere.
                    total += (bits.sum() + (bits * bits).sum()) * (2 * number + 1)
        if total.is_cuda:
            self._hash = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(total, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._hash = total

    @property
    def status(self) -> list[int]:
        """For the exchange of a step: this rank's hash in its tensor-parallel rank's place, zeros elsewhere.

        Data-parallel ranks of one tensor-parallel rank add up, so that one comparison serves all groups.
        """
        size = self._engine.topology.tensor_size
        values = [0] * size
        if self._hash is not None:
            if self._event is not None:
                self._event.synchronize()  # recorded a step ago
            values[self._engine.topology.tensor_rank] = int(self._hash) & _MASK
            self._hash = None
        return values

    @torch.no_grad()
    def poll(self, step: int, sums: list[int]) -> None:
        """Act on the sum of all ranks' ``status``: where copies differ, all take those of tensor-parallel rank 0."""
        different = [rank for rank, value in enumerate(sums) if value != sums[0]]
        if not different:
            return
        group = parallel_state.get_tensor_model_parallel_group()
        source = dist.get_process_group_ranks(group)[0]
        for fragment in self._engine.fragments():
            if fragment.name in self._names:
                for tensor in fragment.tensors.values():
                    _broadcast(tensor, source, group, self._engine.device)
        self._engine.refresh_model()
        if dist.get_rank() == 0:
            warn(
                f"step {step}: copies of parameters differed between tensor-parallel ranks 0 and {different}; all "
                "ranks go on with those of rank 0"
            )


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views of a contiguous float32 tensor, ``PIECE`` elements each: widened to 64 bits they take little memory."""
    return tensor.detach().view(-1).split(PIECE)


def _broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Also of a tensor that an offloading configuration keeps on the host."""
    for piece in _pieces(tensor):
        moved = piece.to(device)
        dist.broadcast(moved, source, group=group)
        piece.copy_(moved)
