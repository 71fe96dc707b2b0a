"""Signals and errors of a rank's worker processes: those that load or write, and the tracker of shared memory.

Ctrl-C in a terminal, srun and scancel signal every process of a rank. The rank alone decides when to stop, since it may
have a step to finish; its worker processes must run until then.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from digit_ds.errors import UserError

_POLL_SECONDS = 1.0
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def ignore_stop_signals(_worker: int = 0) -> None:
    """Ignore SIGINT, SIGTERM and SIGUSR1 in this worker process, except SIGTERM from its parent; exit with the parent.

    Call it in the main thread before others are started; it can be a DataLoader's ``worker_init_fn``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), name="signals", daemon=True).start()


def _wait_for_parent(forker: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker process has a parent
    # getppid() shows that a forking parent exited; with a fork server the parent is another process: its pipe shows it.
    while os.getppid() == forker and parent.is_alive():
        received = signal.sigtimedwait(_STOPPING, _POLL_SECONDS)
        if received and received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            break
    os._exit(0)


@contextmanager
def worker_errors_in_one_line() -> Iterator[None]:
    """Turn errors in DataLoader workers, and their death, into one-line errors.

    Raises:
        UserError: as raised in the worker, without the worker's traceback that DataLoader adds; or a worker was killed,
            which DataLoader raises as a RuntimeError anywhere in the main thread.
    """
    try:
        yield
    except UserError as error:
        if "in DataLoader worker process" not in str(error):
            raise
        kind = type(error)
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that loads data ended ({str(error).partition('. ')[0]}), perhaps by the out-of-memory killer; "
            "run the same command again to continue"
        ) from error


def protect_resource_tracker() -> None:
    """Start multiprocessing's resource tracker with SIGUSR1 ignored, before any shared memory is created.

    A tracker that was killed is restarted without its state and writes tracebacks into the log of a job that stops
    normally.
    """
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # ignored signals stay ignored across exec
    resource_tracker.ensure_running()
    signal.signal(signal.SIGUSR1, before)
