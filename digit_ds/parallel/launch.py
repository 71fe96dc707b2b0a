"""Rank, world and device of this process, from the environment of torchrun, deepspeed or srun, or of no launcher.

Each launcher sets other variables (``deepspeed`` sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE, ``srun``
sets neither), and a launcher inside another leaves the variables of both. ``place()`` reads them all, in one
place, and refuses what contradicts itself: ranks that disagree about the world do not fail, they hang.
"""

import atexit
import faulthandler
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from digit_ds.errors import UserError

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long processes wait at the start for the slowest one, which may load Python from a busy file system."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the processes of its job."""

    rank: int
    """0-based number among all processes."""
    world_size: int
    """Number of all processes."""
    local_rank: int
    """0-based number among the processes of this node."""
    local_world_size: int
    """Number of processes on this node; the same on every node."""


def place(environment: Mapping[str, str] | None = None) -> Place:
    """This process's place, from ``environment`` (default: the process's own).

    Raises:
        UserError: the variables contradict each other.
    """
    environment = os.environ if environment is None else environment
    found = _from_launcher(environment) or _from_srun(environment) or Place(0, 1, 0, 1)
    _check(found)
    return found


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """Environment variable ``name`` as an integer; None where it is unset or empty."""
    text = environment.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"environment variable {name} is {text!r}, expected a whole number") from error


def _from_launcher(environment: Mapping[str, str]) -> Place | None:
    """What torchrun or the deepspeed launcher set, checked against the srun task that it may run in."""
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") or 1
    if world is None and rank is None:
        if (processes := _number(environment, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
            raise UserError(f"mpirun started {processes} processes, expected srun, torchrun or deepspeed to start them")
        return None
    if world is None:
        raise UserError(f"RANK is {rank} but WORLD_SIZE is not set, expected both or neither")
    if world < 1:
        raise UserError(f"WORLD_SIZE is {world}, expected 1 or more")
    agents = _number(environment, "GROUP_WORLD_SIZE")  # set by torchrun: how many torchruns joined
    if tasks > 1 and agents is None:
        return _named_inside_srun(environment, rank, world)
    if agents not in (None, tasks) and tasks > 1:
        raise UserError(
            f"srun started {tasks} torchruns but {agents} joined this one's world of {world}, "
            "expected torchrun --nnodes with the same --rdzv-endpoint on every task"
        )
    if rank is None:
        if world > 1:
            raise UserError(f"WORLD_SIZE is {world} but RANK is not set, expected both or neither")
        rank = 0
    local_world = _local_world(environment, world)
    local_rank = _number(environment, "LOCAL_RANK")
    return Place(rank, world, rank % local_world if local_rank is None else local_rank, local_world)


def _named_inside_srun(environment: Mapping[str, str], rank: int | None, world: int) -> Place:
    """A task of srun whose RANK or WORLD_SIZE is set too (``initialize`` sets them): both must agree."""
    task = _from_srun(environment)
    assert task is not None  # SLURM_STEP_NUM_TASKS was found
    if world != task.world_size or rank not in (None, task.rank):
        raise UserError(
            f"RANK={rank} WORLD_SIZE={world} contradict srun, which started this task as {task.rank} of "
            f"{task.world_size}: unset them, or start one task a node and the ranks by torchrun"
        )
    return task


def _local_world(environment: Mapping[str, str], world: int) -> int:
    """Processes on this node from the launcher's variables; without them, all processes run on one node."""
    torchrun, deepspeed = _number(environment, "LOCAL_WORLD_SIZE"), _number(environment, "LOCAL_SIZE")
    if torchrun and deepspeed and torchrun != deepspeed:
        raise UserError(f"LOCAL_WORLD_SIZE is {torchrun} but LOCAL_SIZE is {deepspeed}, expected the same number")
    return torchrun or deepspeed or world


def _srun_local_world(environment: Mapping[str, str]) -> int:
    """Tasks on each node of an srun step: 4 from ``4(x2)``; ``4,3`` is refused."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    if match := re.fullmatch(r"(\d+)(\(x\d+\))?", text):
        return int(match[1])
    raise UserError(f"srun placed {text or 'an unknown number of'} tasks on the nodes, expected as many on each node")


def _from_srun(environment: Mapping[str, str]) -> Place | None:
    """What srun set. (sbatch sets SLURM_PROCID and SLURM_NTASKS in its shell too; the step's number only srun sets.)"""
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS")
    if tasks is None:
        return None
    on_node = 1 if tasks == 1 else _srun_local_world(environment)
    given = _number(environment, "LOCAL_WORLD_SIZE")
    if given not in (None, on_node):
        raise UserError(f"LOCAL_WORLD_SIZE is {given}, expected {on_node}, the tasks that srun placed on each node")
    return Place(_number(environment, "SLURM_PROCID") or 0, tasks, _number(environment, "SLURM_LOCALID") or 0, on_node)


def _check(found: Place) -> None:
    """Refuse numbers that no launcher can mean."""
    if not 0 <= found.rank < found.world_size:
        raise UserError(f"RANK is {found.rank}, expected 0 to WORLD_SIZE - 1 = {found.world_size - 1}")
    if found.local_world_size < 1 or found.world_size % found.local_world_size:
        raise UserError(
            f"LOCAL_WORLD_SIZE is {found.local_world_size}, expected a divisor of WORLD_SIZE {found.world_size}"
        )
    if not 0 <= found.local_rank < found.local_world_size:
        raise UserError(
            f"LOCAL_RANK is {found.local_rank}, expected 0 to LOCAL_WORLD_SIZE - 1 = {found.local_world_size - 1}"
        )


def rank() -> int:
    """Global rank of this process; 0 when started alone."""
    return place().rank


def world_size() -> int:
    """Number of processes of this job; 1 when started alone."""
    return place().world_size


def local_rank() -> int:
    """Rank among the processes of this node."""
    return place().local_rank


def local_world_size() -> int:
    """Number of processes of this job on this node."""
    return place().local_world_size


def host() -> str:
    """Name of this process's node, as Slurm calls it where Slurm started it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, visible = local_rank(), torch.cuda.device_count()
    if number < visible:
        return torch.device("cuda", number)
    if visible == 1 and "SLURM_STEP_ID" in os.environ:  # srun --gpus-per-task shows each task its own GPU alone
        return torch.device("cuda", 0)
    raise UserError(
        f"this process is number {number} of its node, but {visible} GPUs are visible, expected one for each"
    )


def initialize(timeout: timedelta | None = None) -> None:
    """Join the process group of this job (NCCL on GPUs, gloo on CPUs); a process alone needs none and gets none.

    Afterwards the environment holds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT
    whatever launcher made it, because DeepSpeed and Streaming read them there.

    Args:
        timeout: how long a collective may wait for the other ranks; None: PyTorch's default.

    Raises:
        UserError: the variables contradict each other, or no address for rank 0 can be found.
    """
    here = place()
    if here.world_size == 1 or dist.is_initialized():
        return
    faulthandler.enable()  # a rank that NCCL's watchdog aborts says where it was
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        # The watchdog sleeps four times this long (a minute by default) between a timeout and the end it makes.
        for prefix in ("TORCH_FR", "TORCH_NCCL"):  # the newer and the older name
            os.environ.setdefault(f"{prefix}_WAIT_TIMEOUT_DUMP_MILSEC", "1000")
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        address, port = _address(here)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update(
        RANK=str(here.rank),
        WORLD_SIZE=str(here.world_size),
        LOCAL_RANK=str(here.local_rank),
        LOCAL_WORLD_SIZE=str(here.local_world_size),
    )
    _join(here, timeout)
    atexit.register(_leave)


def _join(here: Place, timeout: timedelta | None) -> None:
    """Connect to the other processes at MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: it is not an address, no process listens there, or another program does.
    """
    address, port = os.environ["MASTER_ADDR"], _number(os.environ, "MASTER_PORT") or 0
    if not 0 < port < 1 << 16:
        raise UserError(f"environment variable MASTER_PORT is {port}, expected 1 to 65535")
    check_interface()
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"environment variable MASTER_ADDR is {address!r}, expected a host that can be found"
        ) from error
    try:
        patience = min(timeout, JOIN_TIMEOUT) if timeout else JOIN_TIMEOUT
        store, rank, world = next(iter(rendezvous("env://", timeout=patience)))
        store.set_timeout(timeout or default_pg_timeout)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("default_pg", store), rank=rank, world_size=world, timeout=timeout
        )
    except RuntimeError as error:  # PyTorch's own, with a trace of C++ calls behind it
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"rank {here.rank} of {here.world_size} cannot join the others at MASTER_ADDR={address} "
            f"MASTER_PORT={port} ({reason})"
        ) from error


def check_interface() -> None:
    """Refuse network interfaces for gloo that this machine does not have."""
    names = [name for _, name in socket.if_nameindex()]
    for wanted in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if wanted not in names:
            raise UserError(
                f"environment variable GLOO_SOCKET_IFNAME is {wanted!r}, expected one of {', '.join(names)} on {host()}"
            )


def _leave() -> None:
    """Stop gloo's threads: an interpreter that ends while they run is aborted now and then (SIGABRT)."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _address(here: Place) -> tuple[str, int]:
    """Host of the first task, and a port that other jobs and other steps on its node do not use."""
    alone = here.world_size == here.local_world_size  # on its node
    nodes, job = os.environ.get("SLURM_STEP_NODELIST"), _number(os.environ, "SLURM_JOB_ID")
    step = _number(os.environ, "SLURM_STEP_ID")
    if job is None or step is None:
        if alone:
            return "127.0.0.1", 29500
        raise UserError("MASTER_ADDR and MASTER_PORT are not set, expected the address of rank 0 and a free port")
    # For the first step it is what slurm/prelude.sh chooses. Jobs and steps that run side by side have near numbers.
    port = 10000 + (job + 997 * step) % 20000
    return ("127.0.0.1" if alone else _first_host(nodes)), port


def _first_host(nodes: str | None) -> str:
    """Address of the first of the nodes that Slurm lists in its own short form."""
    if not nodes:
        raise UserError("MASTER_ADDR is not set and SLURM_STEP_NODELIST names no hosts, expected the address of rank 0")
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        host = hosts.stdout.split()[0]
        try:
            socket.getaddrinfo(host, None)
        except OSError:  # node names that are not host names: Slurm has the address
            node = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=True)
            if (address := re.search(r"NodeAddr=(\S+)", node.stdout)) is None:
                raise UserError(f"scontrol show node {host} says no NodeAddr, expected the node's address") from None
            host = address[1]
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"MASTER_ADDR is not set and scontrol cannot name the hosts of {nodes} ({error})") from error
    return host


def is_main() -> bool:
    """Whether this is rank 0, the only one that prints and writes what exists once."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes of the job are here; nothing to wait for alone."""
    if dist.is_initialized():
        dist.barrier()
