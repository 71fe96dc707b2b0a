"""How fast the ranks of a job exchange numbers, and whether they add up."""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

REPEATS = 5


class Links(NamedTuple):
    """Measured bandwidths in GB/s (10^9 bytes)."""

    all_reduce: float
    """Bus bandwidth of an all-reduce, 2 (n - 1) / n x bytes / seconds: comparable with the link's own speed."""
    neighbours: list[float]
    """Speed from each rank to the next one, the last to the first."""
    wrong: bool
    """Whether a sum was not what it must be."""


def measure(device: torch.device) -> Links:
    """Measure all links of the process group, every process calls it; 256 MiB messages on GPUs, 8 MiB on CPUs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    elements = (64 << 20) if device.type == "cuda" else (2 << 20)
    message = torch.full((elements,), float(rank + 1), device=device)
    dist.all_reduce(message)  # the first one connects
    wrong = torch.tensor([float((message != world * (world + 1) / 2).any())], device=device)
    dist.all_reduce(wrong)
    size = elements * message.element_size()
    seconds = []
    for _ in range(REPEATS):
        begin = _start(device)
        dist.all_reduce(message)
        seconds.append(_stop(device) - begin)
    slowest = torch.tensor([min(seconds)], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    bus = 2 * (world - 1) / world * size / slowest.item() / 1e9
    times = torch.zeros(world, dtype=torch.float64, device=device)
    for sender in range(world):
        for repeat in range(3):  # the first one connects
            spent = _send(message, sender, (sender + 1) % world, device)
            if rank == sender and repeat:
                times[sender] = min(spent, times[sender].item() or spent)
    dist.all_reduce(times)
    return Links(bus, [size / spent / 1e9 for spent in times.tolist()], bool(wrong.item()))


def _send(message: Tensor, sender: int, receiver: int, device: torch.device) -> float:
    """Send a message while all others wait; the sender's seconds until the receiver has it."""
    rank, answer = dist.get_rank(), torch.zeros(1, device=device)
    begin = _start(device)
    if rank == sender:
        dist.send(message, receiver)
        dist.recv(answer, receiver)
    elif rank == receiver:
        dist.recv(message, sender)
        dist.send(answer, sender)
    return _stop(device) - begin


def _start(device: torch.device) -> float:
    """The time at which all ranks begin."""
    dist.barrier()
    return _stop(device)


def _stop(device: torch.device) -> float:
    """The time at which this rank's device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
