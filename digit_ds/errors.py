"""The one exception a user may cause, and how a command ends with it."""

import os
import sys
import time
from collections.abc import Callable, Sequence

LINGER_SECONDS = 1.0
"""How long a rank that failed under srun stays: srun ends the others at once, and words still on their way are lost."""


class UserError(Exception):
    """What the user can mend: one sentence naming the file or key, what was found and what was expected."""


def run_command(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> None:
    """Run a command-line ``main(arguments)`` and leave the process with its exit status.

    A ``UserError`` becomes one sentence on stderr and exit status 2, Ctrl-C a word and 130. ``--debug``, accepted by
    every command, lets the traceback through instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        status = main(arguments) or 0
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
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
