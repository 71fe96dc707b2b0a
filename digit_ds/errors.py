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
"""How long a rank that failed under srun stays: srun ends the others at once, and words still on their way are lost."""

_SITUATIONS = (
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
"""What a file system answers when its state, not this program, is at fault."""

_PEER_IS_GONE = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe")
"""What gloo and its store say of a process that is gone."""


class UserError(Exception):
    """What the user can mend: one line that names the file or key, what was found and what was expected."""


def file_error(error: OSError, path: Path | str | None = None) -> UserError | None:
    """The one line for a failure of the file system that the user can mend; None for any other ``OSError``.

    Args:
        error: as raised; its own file name is used if it has one.
        path: where the failure happened, for errors without a file name (a full disk at ``write``).
    """
    if error.errno not in _SITUATIONS:
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

    A ``UserError``, or a file that cannot be read or written, becomes one line on stderr and exit status 2, Ctrl-C a
    word and 130, and a collective that failed because another process of the job is gone a remark and 1: that process
    says why. ``--debug``, accepted by every command, lets the traceback through instead.
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
        if debug or not _PEER_IS_GONE.search(str(error)):
            raise
        say_peer_is_gone()
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


def say_peer_is_gone() -> None:
    """Remark on stderr that this rank leaves because of another: no error of its own, which is printed elsewhere."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank} on {host}: leaves, another process of this job has ended", file=sys.stderr, flush=True)


def _use_utf8() -> None:
    """Start this process again with UTF-8 file names where the locale says ASCII (``LC_ALL=C PYTHONUTF8=0``).

    File names on Linux are bytes, and those that people give are UTF-8 whatever the locale of a batch job is.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and sys.orig_argv[1:2] != ["-Xutf8"]:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-Xutf8", *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
