"""The one exception a user may cause, and how a command ends with it."""

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LINGER_SECONDS = 1.0
"""Delay before a rank that failed under srun exits: srun then ends the others, and output still in transit is lost."""

_ENVIRONMENT_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
)
"""``errno`` values that come from the state of the file system and not from this program."""

_LOST_PEER = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe")
"""Messages of gloo and its store when a process has exited."""


class UserError(Exception):
    """An error that the user can correct: one line that names the file or key, what was found and what was expected."""


def file_error(error: OSError, path: Path | str | None = None) -> UserError | None:
    """The one-line error for an ``OSError`` from the state of the file system; None for any other.

    Args:
        error: as raised; its own file name is used if it has one.
        path: where the failure happened, for errors without a file name (a full disk at ``write``).
    """
    if error.errno not in _ENVIRONMENT_ERRORS:
        return None
    name = error.filename if error.filename is not None else path
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if name is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return None
    if name is not None and error.errno == errno.ENAMETOOLONG:
        name = f"{str(name)[:80]}..."
    return UserError(f"{name or 'a file'}: cannot be used ({error.strerror})")


def run_command(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> None:
    """Run a command-line ``main(arguments)`` and leave the process with its exit status.

    A ``UserError``, or a file that cannot be read or written, becomes one line on stderr and exit status 2. Ctrl-C
    prints "interrupted" and gives 130. A collective that failed because another process of the job has ended prints
    one line and gives 1; the process that ended first prints the cause. ``--debug``, accepted by every command, shows
    the traceback instead.
    """
    _use_utf8()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    status: str | int | None
    try:
        status = main(arguments) or 0
    except (UserError, OSError) as error:
        known = error if isinstance(error, UserError) else file_error(error)
        if debug or known is None:
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        status = 2
    except RuntimeError as error:
        if debug or not is_lost_peer(error):
            raise
        report_lost_peer()
        status = 1
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr, flush=True)
        status = 130
    except SystemExit as leaving:
        status = leaving.code
    if status and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        time.sleep(LINGER_SECONDS)
    sys.exit(status)


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another process of the job has ended."""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def report_lost_peer() -> None:
    """Print on stderr that this rank exits because another one did; that rank prints the error itself."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank} on {host}: exiting because another process of this job has ended", file=sys.stderr, flush=True)


def _use_utf8() -> None:
    """Start this process again with UTF-8 file names where the locale says ASCII (``LC_ALL=C PYTHONUTF8=0``).

    File names on Linux are bytes, and those that people give are UTF-8 whatever the locale of a batch job is.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and sys.orig_argv[1:2] != ["-Xutf8"]:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-Xutf8", *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
