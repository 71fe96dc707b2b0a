"""How often a second something can be done, on a GPU where there is one."""

import time
from collections.abc import Callable

import torch


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate(work: Callable[[], object], seconds: float) -> float:
    """Calls of ``work`` a second, measured for ``seconds`` after some calls to warm up."""
    for _ in range(5):
        work()
    synchronise()
    started, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(4):
            work()
        synchronise()
        calls += 4
    return calls / elapsed
