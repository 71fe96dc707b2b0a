#!/usr/bin/env python3
"""``digit-ds submit`` as a script: the same options."""

from functools import partial

from digit_ds.cli import run
from digit_ds.errors import run_command

main = partial(run, verb="submit")

if __name__ == "__main__":
    run_command(main)
