"""Check token shards: hashes, counts, views, id ranges; prints token statistics.

    tools/verify_shards.py SHARDS_DIR
    tools/verify_shards.py SHARDS_DIR --images DIR --encoder WEIGHTS --codebook km.npy --vqgan CKPT --sheet sheet.png

With the parts that made the shards, a sample of images is tokenised again and compared.
"""

import argparse

from digit_ds.errors import UserError, run_command
from digit_ds.preparation.verify import describe, verify_shards


def main(arguments: list[str]) -> None:
    """Parse the command line and verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS_DIR", help="complete directory of token shards")
    again = parser.add_argument_group("tokenising a sample again")
    again.add_argument("--images", metavar="DIR", help="the image folder")
    again.add_argument("--encoder", metavar="WEIGHTS", help="the encoder's weights")
    again.add_argument("--layer", type=int, default=3, help="which block from the end gives the features")
    again.add_argument("--num-heads", type=int, help="attention heads; default: width // 64")
    again.add_argument("--codebook", metavar="km.npy", help="the centroids")
    again.add_argument("--vqgan", metavar="CKPT", help="the VQGAN, for shards that hold VQ tokens")
    again.add_argument("--vqgan-config", metavar="YAML", help="its configuration; default: published sizes")
    again.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="arithmetic")
    again.add_argument("--sample", type=int, default=64, help="samples to tokenise again")
    again.add_argument("--agreement", type=float, default=0.99, help="smallest share of equal tokens")
    again.add_argument("--sheet", metavar="PNG", help="write a picture: image, token map, reconstruction")
    options = parser.parse_args(arguments)
    parts = [options.images, options.encoder, options.codebook]
    if any([*parts, options.sheet]) and not all(parts):
        raise UserError("tokenising again and the sheet need all of --images, --encoder and --codebook")
    print(f"{options.shards}: complete and undamaged\n{describe(verify_shards(options.shards))}")
    if all(parts):
        tokenize_again(options)


def tokenize_again(options: argparse.Namespace) -> None:
    """Compare a sample with the shards."""
    from digit_ds.data.shards import read_manifest
    from digit_ds.parallel.launch import device
    from digit_ds.preparation.recheck import recheck, write_sheet
    from digit_ds.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer(
        options.encoder,
        options.codebook,
        options.vqgan,
        vqgan_config=options.vqgan_config,
        layer=options.layer,
        num_heads=options.num_heads,
        image_size=read_manifest(options.shards).image_size,
        precision=options.precision,
        device=device(),
    )
    found = recheck(options.shards, options.images, tokenizer, options.sample)
    for kind, share in found.agreement.items():
        print(f"{kind} tokens of {len(found.samples)} samples tokenised again: {share:.2%} equal")
    if options.sheet:
        write_sheet(options.sheet, found, tokenizer)
        print(f"{options.sheet}: image, map of discriminative tokens{', reconstruction' if options.vqgan else ''}")
    for kind, share in found.agreement.items():
        if share < options.agreement:
            raise UserError(
                f"{options.shards}: {share:.2%} of the {kind} tokens are those of its images, "
                f"expected at least {options.agreement:.2%}"
            )


if __name__ == "__main__":
    run_command(main)
