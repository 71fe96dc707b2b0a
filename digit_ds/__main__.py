"""``python -m digit_ds`` is the ``digit-ds`` command."""

from digit_ds.cli import main

main()
