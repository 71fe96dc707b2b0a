"""Who am I, under every launcher that really starts processes here, and which environments are refused."""

import base64
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from ports import free_port
from slurm_cluster import cluster  # noqa: F401 (a fixture)

from digit_ds.errors import UserError, run_command
from digit_ds.parallel import launch, topology
from digit_ds.parallel.launch import Place, place

HOME = Path(__file__).resolve().parents[1]
PROBE = str(HOME / "tests" / "launch_probe.py")
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "SLURM_JOB",
    "SLURM_STEP",
    "SLURM_PROC",
    "GROUP_",
    "TORCHELASTIC_",
    "OMPI_",
)


def start(*commands: list[str], environment: dict[str, str] | None = None) -> list[dict]:
    """Run commands side by side, each a launcher of PROBE; what all ranks print, in order of rank."""
    clean = {key: value for key, value in (environment or os.environ).items() if not key.startswith(LAUNCHERS)}
    clean |= {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    outputs = [process.communicate(timeout=180) for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    lines = [line for out, _ in outputs for line in out.splitlines() if line.startswith("PROBE ")]
    return sorted((json.loads(line[6:]) for line in lines), key=lambda seen: seen["rank"])


def numbers(seen: list[dict]) -> list[tuple]:
    """(rank, world, local rank, local world, sum, what Streaming reads) of every rank."""
    keys = ("rank", "world", "local_rank", "local_world", "sum", "streaming_reads")
    return [tuple(one[key] for key in keys) for one in seen]


TWO_ON_ONE_NODE = [(0, 2, 0, 2, 3, "2"), (1, 2, 1, 2, 3, "2")]
TWO_NODES = [(0, 2, 0, 1, 3, "1"), (1, 2, 0, 1, 3, "1")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def test_alone():
    assert numbers(start([sys.executable, PROBE])) == [(0, 1, 0, 1, 1, None)]


def test_torchrun():
    assert numbers(start([*TORCHRUN, "2", "--standalone", PROBE])) == TWO_ON_ONE_NODE


def test_torchrun_with_rendezvous_of_two_nodes():
    # Hosts are distinguished by their address, which the two nodes of one machine share: set the host explicitly.
    where = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    nodes = ([*TORCHRUN, "1", *where, "--rdzv-conf", f"is_host={host}", PROBE] for host in ("true", "false"))
    assert numbers(start(*nodes)) == TWO_NODES


def test_deepspeed_launcher():
    command = [sys.executable, "-c", "from deepspeed.launcher.runner import main; main()", "--num_gpus", "2"]
    assert numbers(start([*command, "--master_port", str(free_port()), "--no_local_rank", PROBE])) == TWO_ON_ONE_NODE


def test_deepspeed_hostfile():
    """What ``deepspeed --hostfile`` runs on each host through ssh."""
    world = base64.urlsafe_b64encode(json.dumps({"a": [0], "b": [0]}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
    command += [f"--master_port={free_port()}", "--no_local_rank"]
    assert numbers(start(*([*command, f"--node_rank={node}", PROBE] for node in (0, 1)))) == TWO_NODES


@pytest.mark.slurm
def test_srun(cluster):  # noqa: F811
    """Without any prelude: the ranks come from srun, the first host from Slurm, the port from the job's number."""
    seen = start(["srun", "-N2", "--ntasks-per-node=1", sys.executable, PROBE], environment=cluster.environment)
    assert numbers(seen) == TWO_NODES and [one["node"] for one in seen] == ["n1", "n2"]


@pytest.mark.slurm
@pytest.mark.slow
def test_jobs_and_steps_that_share_a_node_do_not_meet(cluster):  # noqa: F811
    """Two jobs of two ranks on one node at once, then two steps of one job."""
    on_one_node = ["srun", "-N1", "-n2", "-w", "n1", sys.executable, PROBE]
    seen = start(on_one_node, on_one_node, environment=cluster.environment)
    assert [one[:5] for one in numbers(seen)] == [(0, 2, 0, 2, 3)] * 2 + [(1, 2, 1, 2, 3)] * 2
    assert len({one["port"] for one in seen}) == 2
    step = f"srun --exact -n2 {sys.executable} {PROBE}"
    both = ["salloc", "-N1", "-n4", "-w", "n1", "bash", "-c", f"{step} & {step} & wait -n && wait -n"]
    seen = start(both, environment=cluster.environment)
    assert [one[:5] for one in numbers(seen)] == [(0, 2, 0, 2, 3)] * 2 + [(1, 2, 1, 2, 3)] * 2
    assert len({one["port"] for one in seen}) == 2


@pytest.mark.slurm
@pytest.mark.slow
def test_torchrun_inside_srun(cluster):  # noqa: F811
    """One torchrun on each node, started by srun: two ranks each."""
    where = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    # As above: the task of the first node hosts.
    script = 'test "$SLURM_PROCID" = 0 && host=true || host=false; exec "${@:2}" --rdzv-conf is_host=$host "$1"'
    torchrun = ["bash", "-c", script, "bash", str(PROBE), *TORCHRUN, "2", *where]
    command = ["srun", "-N2", "--ntasks-per-node=1", *torchrun]
    seen = numbers(start(command, environment=cluster.environment))
    assert [one[:5] for one in seen] == [(rank, 4, rank % 2, 2, 10) for rank in range(4)]


SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place(0, 1, 0, 1)),
        # In the shell of an sbatch script, where nobody started ranks.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}, Place(0, 1, 0, 1)),
        (SRUN, Place(3, 4, 1, 2)),
        (SRUN | {"WORLD_SIZE": "4"}, Place(3, 4, 1, 2)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, Place(5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2, 1, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, Place(0, 1, 0, 1)),
    ],
)
def test_environment(environment, expected):
    assert place(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, expected 0 to WORLD_SIZE - 1 = 1"),
        ({"RANK": "2"}, "RANK is 2 but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "environment variable WORLD_SIZE is 'two', expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        (
            {"RANK": "0", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"},
            "LOCAL_WORLD_SIZE is 4, expected a divisor of WORLD_SIZE 6",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "2"},
            "LOCAL_WORLD_SIZE is 4 but LOCAL_SIZE is 2",
        ),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK is 2"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2"}, "contradict srun, which started this task as 3 of 4"),
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"},
            "srun started 4 torchruns but 1 joined this one's world of 1",
        ),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "srun placed 3,1 tasks on the nodes"),
        (
            SRUN | {"LOCAL_WORLD_SIZE": "4"},
            "LOCAL_WORLD_SIZE is 4, expected 2, the tasks that srun placed on each node",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
    ],
)
def test_contradictions_are_refused(environment, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        place(environment)
    assert message in str(error.value)


def test_a_contradiction_is_one_sentence_on_the_command_line():
    environment = os.environ | {"RANK": "2", "WORLD_SIZE": "2", "PYTHONPATH": str(HOME)}
    result = subprocess.run([sys.executable, PROBE], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: RANK is 2, expected 0 to WORLD_SIZE - 1 = 1\n")


TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MASTER_PORT": "abc"}, "error: environment variable MASTER_PORT is 'abc', expected a whole number"),
        ({"MASTER_PORT": "70000"}, "error: environment variable MASTER_PORT is 70000, expected 1 to 65535"),
        ({"MASTER_ADDR": "nowhere.invalid"}, "error: environment variable MASTER_ADDR is 'nowhere.invalid', expected"),
        ({"GLOO_SOCKET_IFNAME": "ib7"}, "error: environment variable GLOO_SOCKET_IFNAME is 'ib7', expected one of"),
        ({}, "error: rank 1 of 2 cannot join the others at MASTER_ADDR=127.0.0.1 MASTER_PORT=1 ("),
    ],
)
def test_an_address_where_nobody_can_be_met(changed, message, monkeypatch, capfd):
    """In this process: launchers differ in nothing here."""
    for name, value in (TWO | changed).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "JOIN_TIMEOUT", timedelta(seconds=2))
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: launch.initialize(), [])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert ended.value.code == 2 and line.startswith(message)


def test_a_port_that_another_program_listens_on(monkeypatch, capfd):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in (TWO | {"RANK": "0", "MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            run_command(lambda _: launch.initialize(), [])
    assert ended.value.code == 2 and f"MASTER_PORT={port} (" in capfd.readouterr().err


def test_no_group_outlives_its_job():
    """Whoever lets go of a gloo group later waits for its threads: for ever in a fork, which does not have them."""
    topology.initialize(1, 60.0)
    topology.finish()
    kept = [name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)]
    assert not kept
