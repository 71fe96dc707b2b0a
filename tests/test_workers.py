"""Processes that help a rank: whose signals they obey, and that none outlives it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest


def test_a_signal_to_all_processes_of_a_rank_spares_the_tracker_of_shared_memory():
    script = """
import os, signal, time
from multiprocessing import resource_tracker, shared_memory
from digit_ds.parallel.workers import protect_resource_tracker
from digit_ds.training.preemption import StopSignal
protect_resource_tracker()
memory = shared_memory.SharedMemory(create=True, size=8)
stop = StopSignal()
for process in (resource_tracker._resource_tracker._pid, os.getpid()):
    os.kill(process, signal.SIGUSR1)
time.sleep(0.2)
memory.close()
memory.unlink()
print(stop.requested())
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (finished.stdout, finished.stderr) == ("True\n", "")


def lives(process: psutil.Process) -> bool:
    """Whether a process is there and not merely unburied, as in a container whose first process reaps nobody's."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_helper_obeys_its_parent_only_and_ends_with_it(method, tmp_path):
    """Of three helpers the parent ends one; strangers' signals are nothing to the others, which end with the parent."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing, os, signal, sys, time
from digit_ds.parallel.workers import ignore_stop_signals

def help(ready):
    ignore_stop_signals()
    ready.release()
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    ready = context.Semaphore(0)
    helpers = [context.Process(target=help, args=(ready,)) for _ in range(3)]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        ready.acquire()
    helpers[0].terminate()
    helpers[0].join()
    print(helpers[0].exitcode, helpers[1].pid, helpers[2].pid, flush=True)
    time.sleep(600)
""")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    status, *rest = map(int, parent.stdout.readline().split())
    assert status == 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for helper in rest:
            os.kill(helper, number)
    time.sleep(0.5)
    helpers = [psutil.Process(helper) for helper in rest]
    assert [helper.status() for helper in helpers] == [psutil.STATUS_SLEEPING] * 2
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while any(map(lives, helpers)):
        assert time.monotonic() < end, "helpers outlive their parent"
        time.sleep(0.05)
