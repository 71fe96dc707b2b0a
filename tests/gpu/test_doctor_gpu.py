"""digit-ds doctor on real GPUs: alone, under torchrun with one rank, and over NCCL where there are two."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HOME = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def doctor(ranks: int, folder: Path) -> subprocess.CompletedProcess:
    """The doctor under torchrun."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "digit_ds", "doctor", "--folder", str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HOME), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def said(text: str, check: str) -> tuple[str, str]:
    """Level and sentence of a check."""
    return re.search(rf"^(ok|warning|failed) +{check}: (.*)$", text, re.MULTILINE).groups()


def test_one_rank_sees_its_gpu(tmp_path):
    result = doctor(1, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert said(result.stdout, "devices")[1].startswith(f"1 x {torch.cuda.get_device_name(0)} ({memory:.0f} GiB) on ")
    level, kernels = said(result.stdout, "kernels")
    assert level == "ok" and "flash attention" in kernels and "CPU attention" not in kernels
    assert said(result.stdout, "links") == ("ok", "one process, nothing to sum")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_sum_over_nccl(tmp_path):
    result = doctor(2, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert said(result.stdout, "devices")[1].startswith(f"2 x {torch.cuda.get_device_name(0)} ")
    level, links = said(result.stdout, "links")
    speeds = re.fullmatch(
        r"nccl all-reduce over 2 ranks at (\S+) GB/s \(bus bandwidth\); "
        r"slowest link rank [01] \(\S+\) to rank [01] \(\S+\) with (\S+) GB/s",
        links,
    )
    # Slower than any bus between two GPUs of a machine: the sums went another way, or the clock is wrong.
    assert level == "ok" and all(1 < float(speed) < 2000 for speed in speeds.groups()), links
    assert "has NOT been destroyed" not in result.stderr


def test_more_ranks_than_gpus_is_one_sentence(tmp_path):
    result = doctor(torch.cuda.device_count() + 1, tmp_path)
    assert result.returncode != 0
    assert re.search(r"this process is number \d+ of its node, but \d+ GPUs are visible", result.stderr)
