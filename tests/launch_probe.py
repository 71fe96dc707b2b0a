"""Started by every launcher in test_launch.py: prints where it stands and what a sum over all ranks gives."""

import json
import os
import socket

import torch
import torch.distributed as dist

from digit_ds.errors import run_command
from digit_ds.parallel import launch


def main(_: list[str]) -> None:
    launch.initialize()
    total = torch.tensor([1 + launch.rank()])
    if dist.is_initialized():
        dist.all_reduce(total)
    seen = {
        "rank": launch.rank(),
        "world": launch.world_size(),
        "local_rank": launch.local_rank(),
        "local_world": launch.local_world_size(),
        "device": str(launch.device()),
        "sum": total.item(),
        "streaming_reads": os.environ.get("LOCAL_WORLD_SIZE"),
        "port": os.environ.get("MASTER_PORT"),
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
    }
    os.write(1, ("PROBE " + json.dumps(seen) + "\n").encode())  # one write: lines of ranks must not mix


if __name__ == "__main__":
    run_command(main)
