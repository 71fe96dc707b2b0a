"""Room in /dev/shm, through which processes of PyTorch and StreamingDataset share memory; containers have 64 MiB.

Writing beyond it is no error that a program can catch: the kernel ends the process ("Bus error"), or loading processes
wait for ever. So it is looked at before.
"""

import os

FOLDER = "/dev/shm"
LEAST = 1 << 20
"""Bytes that StreamingDataset's counters and the locks of loading processes need at most."""


def free_bytes() -> int | None:
    """What is free there; None where the system has no such file system."""
    try:
        status = os.statvfs(FOLDER)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def shortage(needed: int) -> str | None:
    """Why ``needed`` bytes do not fit, with the remedy; None: they do."""
    free = free_bytes()
    if free is None or free >= needed:
        return None
    return (
        f"{FOLDER}: has {free / 2**20:.2f} MiB free, expected {needed / 2**20:.2f}; remove what is left there, or give "
        "the container more (docker run --shm-size=1g)"
    )
