"""A directory has one writer at a time, and a writer that is killed leaves no lock."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from training_parts import recipe

from digit_ds.errors import UserError
from digit_ds.generation.job import SamplingJob
from digit_ds.lock import DirectoryLock
from digit_ds.training.loop import train

# Locks, forks a worker as DataLoader would, and prints a line.
HOLDER = """
import os, sys, time
from digit_ds.lock import DirectoryLock
lock = DirectoryLock(sys.argv[1])
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(600)
"""


@contextmanager
def holder(directory: Path):
    """A process that holds the lock, and the process id of its worker."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        try:
            yield process, worker
        finally:
            process.kill()
            os.kill(worker, signal.SIGKILL)


@pytest.mark.fault(
    "two jobs on one output directory",
    stage="every stage",
    outcome="the second is refused with one line; a killed job leaves no lock",
    status="2",
    lost="nothing",
)
def test_the_second_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    out = tmp_path / "new" / "out"
    with holder(out) as (process, worker):
        with pytest.raises(UserError) as refused:
            DirectoryLock(out)
        expected = f"process {process.pid} on {socket.gethostname()} is writing there"
        assert str(refused.value).startswith(f"{out}: {expected}") and "\n" not in str(refused.value)
        process.kill()
        process.wait()
        os.kill(worker, 0)  # its worker still runs
        lock = DirectoryLock(out)
        lock.release()
    assert out.is_dir() and not list(out.iterdir())


def test_a_directory_made_for_the_lock_alone_is_removed(tmp_path):
    DirectoryLock(tmp_path / "out").release()
    assert not (tmp_path / "out").exists()
    lock = DirectoryLock(tmp_path / "out")
    (tmp_path / "out" / "result").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result"]


def test_the_file_of_a_lock_that_was_released_meanwhile_counts_nothing(tmp_path, monkeypatch):
    """Opened while its holder was there, locked when the holder had removed it: somebody may hold a newer one."""
    import fcntl

    first, lockf, calls = DirectoryLock(tmp_path), fcntl.lockf, []

    def release_first(stream, operation):
        calls.append(operation)
        if len(calls) == 1:
            first.release()
        return lockf(stream, operation)

    monkeypatch.setattr(fcntl, "lockf", release_first)
    lock = DirectoryLock(tmp_path)
    assert len(calls) == 2 and (tmp_path / ".lock").exists()
    lock.release()


@pytest.mark.fault(
    "the output directory is not writable or on a read-only file system",
    stage="every stage",
    outcome="one line that names the path",
    status="2",
    lost="nothing",
)
@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["readable", "closed"])
def test_a_directory_that_cannot_be_written_to(mode):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        parent = Path(folder)
        (parent / "out").mkdir()
        parent.chmod(0o755)
        (parent / "out").chmod(mode)
        child = os.fork()
        if child == 0:
            if os.geteuid() == 0:  # root may write everywhere
                os.setuid(65534)
            try:
                DirectoryLock(parent / "out" / "run")
            except UserError as error:
                os._exit(0 if f"{parent}/out/run: cannot be written to (Permission denied)" in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        (parent / "out").chmod(0o755)


def test_a_file_instead_of_a_directory(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="out: cannot be written to"):
        DirectoryLock(tmp_path / "out")


def test_a_run_that_another_process_trains_is_refused(tmp_path):
    run = tmp_path / "run"
    with holder(run) as (process, _), pytest.raises(UserError, match=rf"run: process {process.pid} on .* is writing"):
        train(recipe(run, tmp_path))
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_folder_that_another_process_fills_with_samples_is_refused(tmp_path):
    job = SamplingJob(tmp_path / "out", {}, [0], [])
    with holder(tmp_path / "out") as (process, _):
        assert not job.is_complete()
        with pytest.raises(UserError, match=rf"out: process {process.pid} on .* is writing"):
            job.begin()
    assert not job.is_complete()  # what the killed one leaves is no other folder's
    job.begin()
    job.start()
    assert (tmp_path / "out" / "manifest.json").exists()
