"""The one exception a user may cause, and how a command ends with it."""

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """What the user can mend: one sentence naming the file or key, what was found and what was expected."""


def run_command(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> None:
    """Run a command-line ``main(arguments)`` and leave the process with its exit status.

    A ``UserError`` becomes one sentence on stderr and exit status 2. ``--debug``, accepted by every command,
    lets the traceback through instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        status = main(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    sys.exit(status or 0)
