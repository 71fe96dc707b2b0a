"""What holds for all tests: one thread a process, and an environment that the next test finds unchanged."""

import os

# Many tests start several processes, and waiting OpenMP threads of one starve the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

import pytest


@pytest.fixture(autouse=True)
def same_environment():
    """Undo what a test sets: training leaves RANK and its like behind, which would contradict the next launcher."""
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)
