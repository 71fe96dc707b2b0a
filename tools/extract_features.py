"""Features of an image folder, for K-Means. Works alone, under torchrun and under srun; a killed run goes on.

tools/extract_features.py --images DIR --encoder WEIGHTS --layer 3 --out FEATURES_DIR
"""

import argparse

from digit_ds.errors import run_command
from digit_ds.preparation.features import BLOCK_IMAGES, extract_features
from digit_ds.preparation.options import add_job_options


def main(arguments: list[str]) -> None:
    """Parse the command line and extract features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_options(parser, "FEATURES_DIR", "chunk", BLOCK_IMAGES)
    parser.add_argument("--image-size", type=int, help="side of the random crop; default: the encoder's own size")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--points", type=int, help="patches kept of each image; default: all")
    kept.add_argument("--fraction", type=float, help="share of patches kept, drawn patch by patch")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="fp16", help="stored type")
    extract_features(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
