"""MDS token shards of an image folder. Works alone, under torchrun and under srun; a killed run goes on.

tools/tokenize_images.py --images DIR --encoder WEIGHTS --codebook km.npy --vqgan CKPT --views N --out SHARDS_DIR
"""

import argparse
from typing import get_args

from digit_ds.data.images import CropKind
from digit_ds.errors import run_command
from digit_ds.preparation.options import add_job_options
from digit_ds.preparation.tokens import BLOCK_IMAGES, tokenize_images


def main(arguments: list[str]) -> None:
    """Parse the command line and tokenise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_options(parser, "SHARDS_DIR", "block of shards", BLOCK_IMAGES)
    parser.add_argument("--codebook", required=True, metavar="km.npy", help="centroids [K, E]")
    parser.add_argument("--vqgan", metavar="CKPT", help="VQGAN; default: discriminative tokens alone")
    parser.add_argument("--vqgan-config", metavar="YAML", help="taming-style configuration; default: published sizes")
    parser.add_argument("--views", type=int, help="samples per image; default: 1, and 10 with ten-crop")
    parser.add_argument("--crops", choices=get_args(CropKind), default="training", help="how views are cut")
    parser.add_argument("--image-size", type=int, help="side of a view; default: the largest the encoder takes")
    parser.add_argument(
        "--resize", type=int, help="short side before cropping; default: image size, 1.1 x for ten-crop"
    )
    tokenize_images(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
