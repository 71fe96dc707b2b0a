"""Mean and covariance of a reference's features, computed once: what ``digit-ds evaluate --reference`` and a recipe's
``preview.fid_reference`` take in place of the pictures.

    tools/save_statistics.py --reference DIR --inception-weights WEIGHTS --out reference.npz

Precision and recall still need the pictures themselves.
"""

import argparse
from typing import get_args

from digit_ds.errors import run_command
from digit_ds.evaluation.fidelity import BATCH, save_statistics
from digit_ds.evaluation.pictures import Preparation


def main(arguments: list[str]) -> None:
    """Parse the command line and compute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of pictures, or .npz in ADM's layout")
    parser.add_argument("--out", required=True, metavar="NPZ", help="file to write")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--inception-weights", help="local file of torch-fidelity's Inception weights")
    network.add_argument("--features", help="feature network (safetensors) in place of Inception")
    parser.add_argument(
        "--preparation", choices=get_args(Preparation), default="none", help="of the pictures of a folder"
    )
    parser.add_argument("--size", type=int, help="side of the prepared pictures")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures of one forward pass")
    save_statistics(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
