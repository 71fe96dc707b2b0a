"""Signals and failures of the processes that help a rank: those that load or write, the tracker of shared memory.

A terminal's Ctrl-C, srun and scancel signal every process of a rank. What follows is the rank's business, which may
want to finish what it is at: its helpers must live until then.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from digit_ds.errors import UserError

_LOOK_SECONDS = 1.0
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def obey_parent_only(_worker: int = 0) -> None:
    """Make this process deaf to what asks to stop, but for SIGTERM from its parent; it ends soon after its parent.

    To be called by its main thread before it has others; fits a DataLoader's ``worker_init_fn``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    threading.Thread(target=_listen, args=(os.getppid(),), name="signals", daemon=True).start()


def _listen(forker: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a helper is somebody's child
    # A parent that forked is missed at once. One that had a server fork is another process, and seen by its pipe.
    while os.getppid() == forker and parent.is_alive():
        received = signal.sigtimedwait(_STOPPING, _LOOK_SECONDS)
        if received and received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            break
    os._exit(0)


@contextmanager
def loaders_in_one_sentence() -> Iterator[None]:
    """Failures in and of DataLoader's processes as one-line errors.

    Raises:
        UserError: as it was raised in such a process, where DataLoader wraps it in that process's traceback; or one was
            killed, which DataLoader raises as RuntimeError wherever the main thread happens to be.
    """
    try:
        yield
    except UserError as error:
        if "in DataLoader worker process" not in str(error):
            raise
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("digit_ds.errors.UserError: ")) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that loads data ended ({str(error).partition('. ')[0]}), perhaps for want of memory; "
            "expected it to stay; the same call again goes on"
        ) from error


def shield_tracker() -> None:
    """Start multiprocessing's resource tracker such that SIGUSR1 does not end it; before any shared memory is made.

    A tracker that died is started again, knows nothing of what there was, and fills the log of a job that stops in good
    order with tracebacks.
    """
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # what is ignored stays so in a new program
    resource_tracker.ensure_running()
    signal.signal(signal.SIGUSR1, before)
