"""The command-line options that the jobs over image folders share."""

import argparse
from typing import get_args

from digit_ds.preparation.loading import JpegDecoder


def add_job_options(parser: argparse.ArgumentParser, out: str, block: str, block_images: int) -> None:
    """Options of ``extract_features`` and ``tokenize_images`` alike.

    ``out`` is the output directory's name in the help, ``block`` what a block of images is called there.
    """
    parser.add_argument("--images", required=True, metavar="DIR", help="image folder; its folders are the classes")
    parser.add_argument("--encoder", required=True, metavar="WEIGHTS", help="DINOv2-format weights")
    parser.add_argument("--layer", type=int, default=3, help="which block from the end gives the features")
    parser.add_argument("--num-heads", type=int, help="attention heads; default: width // 64")
    parser.add_argument("--out", required=True, metavar=out, help="new directory, or one to continue")
    parser.add_argument("--no-flip", action="store_false", dest="flips", help="never mirror a random view")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is random: crops, flips, kept patches")
    parser.add_argument("--batch", type=int, default=256, help="views at a time")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="arithmetic")
    parser.add_argument("--compile", action="store_true", help="fuse the networks with torch.compile")
    parser.add_argument("--decoder", choices=get_args(JpegDecoder), default="cpu", help="where JPEG files are decoded")
    parser.add_argument("--workers", type=int, help="decoding processes per rank; default: all cores")
    parser.add_argument("--block-images", type=int, default=block_images, help=f"images per {block}")
    parser.add_argument("--max-skipped", type=float, default=0.25, help="largest share of unreadable images")
