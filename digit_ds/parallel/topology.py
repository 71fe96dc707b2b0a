"""Which processes share what: Megatron's groups, the ``mpu`` that DeepSpeed is given, the mailbox of small numbers.

Tensor-parallel ranks are consecutive (Megatron's order), so that a tensor-parallel group lies inside a node and its
ranks read the same samples.
"""

import faulthandler
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from digit_ds.errors import UserError
from digit_ds.parallel import decide, launch
from digit_ds.parallel.frameworks import parallel_state
from digit_ds.parallel.mailbox import MAIL, total

LEAVE_SECONDS = 30.0
"""How long a process may take to say why it failed and to end."""


class Mpu:
    """Megatron's parallel state under the names that DeepSpeed reads.

    Without an ``mpu`` DeepSpeed broadcasts rank 0's weights over all tensor-parallel ranks, silently; the plain
    ``parallel_state`` lacks the ``model_parallel`` names, which mean the tensor-parallel group here.
    """

    _TENSOR = "tensor_model_parallel"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_model_parallel_"):
            name = f"get_{self._TENSOR}_{name.removeprefix('get_model_parallel_')}"
        return getattr(parallel_state, name)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of this process's data-parallel group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


@dataclass(frozen=True)
class Topology:
    """This process's place in the grid of processes."""

    tensor_size: int
    tensor_rank: int
    data_size: int
    data_rank: int
    mailbox: dist.ProcessGroup
    """A gloo group of all processes: exchanges small numbers between hosts without using a device's queue."""

    @property
    def world_size(self) -> int:
        """Number of processes of the job."""
        return self.tensor_size * self.data_size

    def sum(self, values: list[int], tag: int = MAIL) -> list[int]:
        """Whole numbers, summed over all processes. Sums at the same time need different tags."""
        return values if self.world_size == 1 else total(self.mailbox, values, tag)


def initialize(tensor_size: int, timeout_seconds: float) -> Topology:
    """Join the process group (also alone: DeepSpeed and Megatron need one) and build the groups of this layout.

    A collective that does not finish within ``timeout_seconds`` ends the process instead of hanging for ever.
    """
    world = launch.world_size()
    if world % tensor_size:
        raise UserError(f"parallel.tensor is {tensor_size}, expected a divisor of the {world} processes of this job")
    os.environ.update(  # for StreamingDataset and DeepSpeed, which read it there whatever launcher there was
        RANK=str(launch.rank()),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(launch.local_rank()),
        LOCAL_WORLD_SIZE=str(launch.local_world_size()),
    )
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        launch.initialize(timeout)
    if not dist.is_initialized():
        launch.check_interface()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_seconds / 60,
        )
    world_group = dist.group.WORLD
    mailbox = world_group if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(mailbox, dist.ProcessGroup)
    return Topology(
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        mailbox=mailbox,
    )


def abandon() -> None:
    """Exit after a failure, when other ranks may have ended or wait for a message that is not sent.

    NCCL would wait for them too, and the error would not be printed. Its groups are left to the end of the
    process, which is forced after ``LEAVE_SECONDS`` where it does not come by itself.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl" and dist.get_world_size() > 1:
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)
    else:
        finish()


def finish() -> None:
    """Leave all groups; a process group left open warns at exit."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        # Releasing a gloo group waits for its threads, which a forked process does not have.
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
    decide.forget()
    if dist.is_initialized():
        dist.destroy_process_group()
