"""Triton's interpreter, which runs kernels without a GPU. Triton reads the variable once: each program is a process."""

import os
import subprocess
import sys
from pathlib import Path


def interpret(program: str) -> None:
    """Run a Python program to its end, at which it prints "equal"."""
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (root, root / "benchmarks")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("equal")
