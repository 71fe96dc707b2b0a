"""Benchmarks run seldom, and some on many GPUs only: what they use of the package must exist all the same."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
from train_speed import exposed, middle_step

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "tests", "tools"])
def test_what_scripts_import_exists(folder):
    missing, seen = [], 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("digit_ds"):
                module = importlib.import_module(node.module)
                seen += 1
                names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                missing += [f"{path.name}: {node.module}.{n}" for n in names if not find_spec(f"{node.module}.{n}")]
    assert seen and not missing


def kernel(start: int, length: int, issued: int, name: str = "gemm") -> list[dict]:
    """A kernel and the call that issued it."""
    common = {"args": {"correlation": issued}, "name": name}
    return [
        common | {"cat": "kernel", "ts": start, "dur": length},
        common | {"cat": "cuda_runtime", "ts": issued, "dur": 1},
    ]


def test_a_traced_step_has_what_the_step_before_sends_beside_it():
    """The host runs ahead of the device: kernels belong to a step by when they were issued, its end is the next one."""
    marks = [{"cat": "user_annotation", "name": f"training step {n}", "ts": at} for n, at in ((7, 0), (8, 10), (9, 20))]
    kernels = [
        kernel(100, 50, 1),
        kernel(170, 20, 2, "ncclDevKernel_AllGather"),  # issued in the first step
        kernel(160, 40, 11),
        kernel(200, 10, 12, "ncclDevKernel_AllReduce"),
        kernel(210, 50, 21),
    ]
    step = middle_step([*marks, *(event for pair in kernels for event in pair)])
    assert [found["ts"] for found in step] == [160, 170, 200]
    assert exposed(step) == {"AllReduce": 10}
    assert exposed([k[0] for k in (kernel(0, 20, 1, "ncclDevKernel_AllGather_RING_LL"), kernel(5, 5, 2))]) == {
        "AllGather": 15
    }
    assert middle_step([*marks[:2], *kernels[0]]) == []
