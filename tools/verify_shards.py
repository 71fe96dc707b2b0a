"""Check token shards: hashes, counts, views, id ranges; prints token statistics.

tools/verify_shards.py SHARDS_DIR
"""

import argparse

from digit_ds.errors import run_command
from digit_ds.preparation.verify import describe, verify_shards


def main(arguments: list[str]) -> None:
    """Parse the command line and verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS_DIR", help="complete directory of token shards")
    options = parser.parse_args(arguments)
    print(f"{options.shards}: complete and undamaged\n{describe(verify_shards(options.shards))}")


if __name__ == "__main__":
    run_command(main)
