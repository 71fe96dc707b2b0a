"""Features of an image folder, for K-Means. Works alone, under torchrun and under srun; a killed run goes on.

tools/extract_features.py --images DIR --encoder WEIGHTS --layer 3 --out FEATURES_DIR
"""

import argparse
from typing import get_args

from digit_ds.errors import run_command
from digit_ds.preparation.features import BLOCK_IMAGES, extract_features
from digit_ds.preparation.loading import Decoder


def main(arguments: list[str]) -> None:
    """Parse the command line and extract features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, metavar="DIR", help="image folder")
    parser.add_argument("--encoder", required=True, metavar="WEIGHTS", help="DINOv2-format weights")
    parser.add_argument("--layer", type=int, default=3, help="which block from the end gives the features")
    parser.add_argument("--num-heads", type=int, help="attention heads; default: width // 64")
    parser.add_argument("--out", required=True, metavar="FEATURES_DIR", help="new directory, or one to continue")
    parser.add_argument("--image-size", type=int, help="side of the random crop; default: the encoder's own size")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--points", type=int, help="patches kept of each image; default: all")
    kept.add_argument("--fraction", type=float, help="share of patches kept, drawn patch by patch")
    parser.add_argument("--no-flip", action="store_false", dest="flips", help="never mirror an image")
    parser.add_argument("--seed", type=int, default=0, help="seed of crops, flips and kept patches")
    parser.add_argument("--batch", type=int, default=256, help="images at a time")
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16", help="stored type")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="encoder's arithmetic")
    parser.add_argument("--compile", action="store_true", help="fuse encoder with torch.compile")
    parser.add_argument("--decoder", choices=get_args(Decoder), default="cpu", help="where JPEG files are decoded")
    parser.add_argument("--workers", type=int, help="decoding processes per rank; default: all cores")
    parser.add_argument("--block-images", type=int, default=BLOCK_IMAGES, help="images per chunk")
    parser.add_argument("--max-skipped", type=float, default=0.25, help="largest share of unreadable images")
    extract_features(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
