"""MDS token shards of an image folder. Works alone, under torchrun and under srun; a killed run goes on.

tools/tokenize_images.py --images DIR --encoder WEIGHTS --codebook km.npy --vqgan CKPT --views N --out SHARDS_DIR
"""

import argparse
from typing import get_args

from digit_ds.data.images import CropKind
from digit_ds.errors import run_command
from digit_ds.preparation.loading import Decoder
from digit_ds.preparation.tokens import BLOCK_IMAGES, tokenize_images


def main(arguments: list[str]) -> None:
    """Parse the command line and tokenise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, metavar="DIR", help="image folder; its folders are the classes")
    parser.add_argument("--encoder", required=True, metavar="WEIGHTS", help="DINOv2-format weights")
    parser.add_argument("--layer", type=int, default=3, help="which block from the end gives the features")
    parser.add_argument("--num-heads", type=int, help="attention heads; default: width // 64")
    parser.add_argument("--codebook", required=True, metavar="km.npy", help="centroids [K, E]")
    parser.add_argument("--vqgan", metavar="CKPT", help="VQGAN; default: discriminative tokens alone")
    parser.add_argument("--vqgan-config", metavar="YAML", help="taming-style configuration; default: published sizes")
    parser.add_argument("--views", type=int, help="samples per image; default: 1, and 10 with ten-crop")
    parser.add_argument("--crops", choices=get_args(CropKind), default="training", help="how views are cut")
    parser.add_argument("--out", required=True, metavar="SHARDS_DIR", help="new directory, or one to continue")
    parser.add_argument("--image-size", type=int, help="side of a view; default: the largest the encoder takes")
    parser.add_argument(
        "--resize", type=int, help="short side before cropping; default: image size, 1.1 x for ten-crop"
    )
    parser.add_argument("--no-flip", action="store_false", dest="flips", help="never mirror a random view")
    parser.add_argument("--seed", type=int, default=0, help="seed of crops and flips")
    parser.add_argument("--batch", type=int, default=256, help="views at a time")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="arithmetic")
    parser.add_argument("--compile", action="store_true", help="fuse encoder and VQGAN with torch.compile")
    parser.add_argument("--decoder", choices=get_args(Decoder), default="cpu", help="where JPEG files are decoded")
    parser.add_argument("--workers", type=int, help="decoding processes per rank; default: all cores")
    parser.add_argument("--block-images", type=int, default=BLOCK_IMAGES, help="images per block of shards")
    parser.add_argument("--max-skipped", type=float, default=0.25, help="largest share of unreadable images")
    tokenize_images(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
