#!/usr/bin/env python3
"""``digit-ds tokenize`` as a script: the same options."""

from digit_ds.cli import main

if __name__ == "__main__":
    main(verb="tokenize")
