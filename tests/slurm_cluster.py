"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd in a private folder.

Nothing of the machine's own configuration is read or changed: ports, sockets, keys, state and logs are the cluster's
own, and all daemons end with it. Both nodes are this machine under two names, which is what Slurm calls
multiple-slurmd support; sbatch, srun, time limits, requeueing and node failures behave as on two machines.
"""

import contextlib
import ctypes
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import DAEMONS, free_ports

from digit_ds.cluster.submit import QUEUED

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
NODES = ("n1", "n2")
CPUS_PER_NODE = 4  # more than the machine may have: Slurm is told to believe it
LOST_AFTER = 300
"""Seconds without an answer after which a node counts as lost, Slurm's default: a busy machine must lose none."""

CONFIGURATION = """\
ClusterName=digit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits cred_expire seconds before it starts again: 120 by default, 5 at least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Temporary files are a node's own too.
TaskProlog={folder}/task_prolog
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={lost_after}
SlurmctldTimeout=10
# On a busy machine messages and the end of processes take long; no node is to be drained for it.
MessageTimeout=60
UnkillableStepTimeout=600
KillWait=20
InactiveLimit=0
MinJobAge=1800
FirstJobId={first_job}
JobRequeue=1
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    """What of Slurm and munge is not installed here; empty when a cluster can be started."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def may_unshare() -> bool:
    """Whether each node can have its own /dev/shm; training needs it: ranks of a node share files there."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True).returncode == 0


class Cluster:
    """The running cluster: ``environment`` is what its clients need, ``folder`` holds everything it writes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.small_disk = folder / "small_disk"  # a file system of 128 KiB, where one may be mounted
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start all daemons and wait until both nodes take jobs."""
        host = socket.gethostname().split(".")[0]
        controller, *node_ports = free_ports(1 + len(NODES), DAEMONS)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={CPUS_PER_NODE} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS_PER_NODE} ThreadsPerCore=1"
            for name, port in zip(NODES, node_ports)
        )
        (self.folder / "state").mkdir()
        for name in NODES:
            (self.folder / f"spool.{name}").mkdir()
            (self.folder / f"tmp.{name}").mkdir()
        prolog = self.folder / "task_prolog"
        prolog.write_text(f'#!/bin/sh\necho "export TMPDIR={self.folder}/tmp.$SLURMD_NODENAME"\n')
        prolog.chmod(0o755)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                controller_port=controller,
                user=pwd.getpwuid(os.geteuid()).pw_name,
                folder=self.folder,
                lost_after=LOST_AFTER,
                # The job id gives MASTER_PORT: two clusters on one machine must not count from the same number.
                first_job=random.SystemRandom().randrange(1, 1 << 22),
                nodes=nodes,
                names=",".join(NODES),
            )
        )
        # Before the nodes start: later mounts are not visible to them.
        self.small_disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(self.small_disk)]
        subprocess.run(mount, capture_output=True, check=False)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._launch(
            "munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed", "--num-threads=2",
        )  # fmt: skip
        self._await(lambda: (self.folder / "munge.socket").exists(), "munged made its socket")
        self._launch("slurmctld", "slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        self._await(lambda: self._states() == ["idle"] * len(NODES), "both nodes were idle")

    def start_node(self, name: str) -> None:
        """Start the slurmd of one node, with shared memory of its own as on a machine of its own."""
        private = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
        self._launch(name, *(private if may_unshare() else []), "slurmd", "-D", "-N", name)

    def stop_node(self, name: str) -> None:
        """Kill the slurmd of one node, as when the machine fails: job processes there are killed too."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for process in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError, ValueError):
                variables = process.read_bytes()
                ours = f"SLURM_CONF={self.folder}/slurm.conf\0".encode() in variables
                if ours and f"SLURMD_NODENAME={name}\0".encode() in variables:
                    os.kill(int(process.parent.name), signal.SIGKILL)

    @contextlib.contextmanager
    def lost_after(self, seconds: int) -> Iterator[None]:
        """Let a node that does not answer count as lost after ``seconds``, for the length of a ``with`` block."""
        self._set_lost_after(seconds)
        try:
            yield
        finally:
            self._set_lost_after(LOST_AFTER)

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons."""
        if "slurmctld" in self._daemons:
            self.run("scancel", "--signal=KILL", "--full", f"--user={os.geteuid()}", check=False)
            self.run("scancel", f"--user={os.geteuid()}", check=False)
            with contextlib.suppress(AssertionError):
                self._await(lambda: not self.run("squeue", "--noheader", check=False).strip(), "all jobs ended", 25)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if self.small_disk.is_mount():
            subprocess.run(["umount", str(self.small_disk)], check=True)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Standard output of a client command; a failure shows its standard error."""
        result = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, *options: str, cwd: Path) -> int:
        """Job id of ``sbatch options``, run in ``cwd``."""
        return int(self.run("sbatch", "--parsable", *options, cwd=cwd).strip())

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` says, by field."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait(self, number: int, timeout: float = 300, states: tuple[str, ...] = ()) -> dict[str, str]:
        """Wait until a job is in one of ``states`` (default: until it has ended); its final fields."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(number)
            if job["JobState"] in states if states else job["JobState"] not in QUEUED:
                return job
            if time.monotonic() > deadline:
                nodes = self.run("scontrol", "--oneliner", "show", "node", check=False)
                pytest.fail(f"job {number} is still {job['JobState']} ({job['Reason']}): {nodes}{self._logs()}")
            if "DRAINED" in job["Reason"]:
                self._resume_drained()
            time.sleep(0.3)

    def _resume_drained(self) -> None:
        """Return drained nodes to service, as an administrator does, with a warning that gives the reason.

        Slurm drains a node when a process there does not end or a batch script does not start in time, which a busy
        machine can cause.
        """
        for line in self.run("sinfo", "--noheader", "--Node", "--format=%N %T %E").splitlines():
            name, state, reason = line.split(maxsplit=2)
            if state.startswith("drain"):
                warnings.warn(f"node {name} was drained ({reason}) and is resumed", stacklevel=2)
                self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)

    def _set_lost_after(self, seconds: int) -> None:
        path = self.folder / "slurm.conf"
        path.write_text(re.sub(r"(?m)^SlurmdTimeout=\d+$", f"SlurmdTimeout={seconds}", path.read_text()))
        self.run("scontrol", "reconfigure")

    def _states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()

    def _launch(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        log.close()

    def _await(self, condition, what: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"{dead or 'time'} ended before {what}: {self._logs()}"
            time.sleep(0.05)

    def _logs(self) -> str:
        """The last lines of every log, for the message of a failure."""
        files = [*sorted(self.folder.glob("*.out")), *sorted(self.folder.glob("*.log"))]
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in files)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster for the length of a ``with`` block."""
    # Not pytest's folder: a socket's path may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="digit-slurm-"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent() -> None:
    """Ask the kernel to end this process when the test run does, killed test runs included."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A running cluster of the module's own; the test is skipped, and says why, where Slurm is not installed."""
    if missing := missing_programs():
        pytest.skip(f"no Slurm cluster: {', '.join(missing)} not installed (Debian: slurm-wlm and munge)")
    with running_cluster() as started:
        yield started
