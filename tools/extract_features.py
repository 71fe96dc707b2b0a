#!/usr/bin/env python3
"""``digit-ds features`` as a script: the same options."""

from digit_ds.cli import main

if __name__ == "__main__":
    main(verb="features")
