"""Who this process is: rank, world and device, from the environment that torchrun, deepspeed, srun or nobody made."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from digit_ds.errors import UserError


def _number(*names: str, default: int) -> int:
    """The first of the environment variables ``names`` that is set, as an integer."""
    for name in names:
        if value := os.environ.get(name):
            try:
                return int(value)
            except ValueError as error:
                raise UserError(f"environment variable {name} is {value!r}, expected a whole number") from error
    return default


def rank() -> int:
    """Global rank of this process; 0 when started alone."""
    return _number("RANK", "SLURM_PROCID", default=0) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes of this job; 1 when started alone.

    Inside an sbatch script SLURM_NTASKS is set for the batch shell too; only ``srun`` sets SLURM_STEP_NUM_TASKS.
    """
    return _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)


def local_rank() -> int:
    """Rank among the processes of this node."""
    return _number("LOCAL_RANK", "SLURM_LOCALID", default=0) if world_size() > 1 else 0


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def initialize(timeout: timedelta | None = None) -> None:
    """Join the process group of this job (NCCL on GPUs, gloo on CPUs); a process alone needs none and gets none.

    ``timeout`` is how long a collective may take before the process is ended (PyTorch's own default when unset).
    """
    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.update(RANK=str(rank()), WORLD_SIZE=str(world_size()), LOCAL_RANK=str(local_rank()))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)


def is_main() -> bool:
    """Whether this is rank 0, the only one that prints and writes what exists once."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes of the job are here; nothing to wait for alone."""
    if dist.is_initialized():
        dist.barrier()
