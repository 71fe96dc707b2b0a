"""Mean and covariance of a reference's features, computed once: what ``digit-ds evaluate --reference`` and a recipe's
``preview.fid_reference`` take in place of the pictures.

    tools/save_statistics.py --reference DIR --inception-weights WEIGHTS --out reference.npz

Precision and recall still need the pictures themselves.
"""

import argparse

from digit_ds.errors import run_command
from digit_ds.evaluation.fidelity import save_statistics
from digit_ds.evaluation.options import add_reference_options


def main(arguments: list[str]) -> None:
    """Parse the command line and compute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of pictures, or .npz in ADM's layout")
    parser.add_argument("--out", required=True, metavar="NPZ", help="file to write")
    add_reference_options(parser)
    save_statistics(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
