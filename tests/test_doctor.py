"""digit-ds doctor: output on a machine without faults, and the line of each fault."""

import os
import re
import subprocess
import sys
from pathlib import Path

import calls
import pytest
from slurm_cluster import cluster  # noqa: F401 (a fixture)

from digit_ds.data.shards import COLUMNS, ShardManifest, merge_blocks, write_block
from digit_ds.errors import UserError
from digit_ds.health import doctor

HOME = Path(__file__).resolve().parents[1]
PROBE = str(HOME / "tests" / "doctor_probe.py")


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three small blocks of token shards."""
    import numpy as np

    folder = tmp_path / "shards"
    names = [name for name in COLUMNS if name != "vq"]
    for block in range(3):
        sample = {"discriminative": np.full(4, block, np.uint16), "label": 0, "view": 0}
        write_block(folder / f"{block}", [sample | {"image_id": f"{block}.png", "index": block}], names)
    digest = merge_blocks(folder, ["0", "1", "2"])
    ShardManifest(3, 1, ["a"], [2, 2], 32, 8, 0, "training", {}, 0, digest).write(folder)
    return folder


def run(*command: str, environment: dict[str, str] | None = None, **fault: str) -> subprocess.CompletedProcess:
    clean = (environment or os.environ) | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"} | fault
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=180)


def levels(text: str) -> dict[str, str]:
    return {match[2]: match[1] for match in re.finditer(r"^(ok|warning|failed) +([\w ]+): ", text, re.MULTILINE)}


def test_alone_all_is_well(tmp_path, shards, capsys):
    calls.doctor(tmp_path, shards)
    said = capsys.readouterr().out
    assert set(levels(said)) == {"versions", "devices", "kernels", "links", "shared files", "free space", "shards"}
    assert "failed" not in levels(said).values() and "3 of 3 shards read by each rank" in said


@pytest.mark.fault(
    "a token shard is damaged",
    stage="doctor",
    outcome="the shard is named",
    status="not 0",
    lost="nothing",
)
def test_a_damaged_shard_is_named(tmp_path, shards, capsys):
    damaged = next((shards / "1").glob("shard*.zstd"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match="1 of 7 checks failed: shards"):
        calls.doctor(tmp_path, shards)
    assert str(damaged) in capsys.readouterr().out


def test_little_room_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SPACE_GIB", 10**9)
    calls.doctor(tmp_path)
    assert levels(capsys.readouterr().out)["free space"] == "warning"


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("version", r"rank 1 \(\S+\) has torch 0.1 but rank 0 \(\S+\) has torch|rank 1 \(\S+\) has torch 0.1 but"),
        ("folder", r"rank 1 \(\S+\) cannot write to|does not see in"),
    ],
)
def test_a_rank_that_differs_is_named(tmp_path, fault, sentence):
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROBE]
    result = run(*command, str(tmp_path), FAULT=fault)
    assert re.search(sentence, result.stdout), result.stdout + result.stderr
    assert "error: 1 of 6 checks failed: " + ("versions" if fault == "version" else "shared files") in result.stderr
    assert not list(tmp_path.glob(".doctor*"))


@pytest.mark.slurm
def test_two_nodes_of_a_cluster(tmp_path, cluster, shards):  # noqa: F811
    command = ["srun", "-N2", "--ntasks-per-node=1", sys.executable, PROBE, str(tmp_path), str(shards)]
    result = run(*command, environment=cluster.environment)
    assert result.returncode == 0, result.stderr
    assert "failed" not in levels(result.stdout).values() and len(levels(result.stdout)) == 7
    assert re.search(r"gloo all-reduce over 2 ranks at \d+\.\d\d GB/s .* rank \d \(n\d\) to rank \d", result.stdout)
    assert "CPU" in result.stdout and "on n1, n2" in result.stdout
