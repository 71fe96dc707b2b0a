#!/usr/bin/env python
"""Convert models between the published format, released model directories and tensor-parallel parts.

from-official    published (fairseq) checkpoint -> released model directory
to-official      released model directory -> published checkpoint
to-megatron      released model directory -> one file for each tensor-parallel rank, to train from
from-megatron    back
from-checkpoint  training run or checkpoint -> released model directory (what `digit-ds export` does)
"""

import argparse
import sys

from digit_ds.errors import run_command


def main(arguments: list[str]) -> None:
    """Parse the arguments and make one call into the package."""
    options = _parser().parse_args(arguments)
    if options.command == "from-official":
        from digit_ds.model.official import from_official

        spec = from_official(
            options.checkpoint,
            options.out,
            grid=tuple(options.grid),
            carry=not options.drop_carried,
            encoder_out=options.encoder_out,
            codebook_out=options.codebook_out,
            vqgan_out=options.vqgan_out,
        )
        print(f"{options.out}: {spec.kind}, {spec.layers} layers of width {spec.width}, {spec.classes} classes")
    elif options.command == "to-official":
        from digit_ds.model.official import to_official

        given = {"encoder": options.encoder, "codebook": options.codebook, "vqgan": options.vqgan}
        lacking = to_official(options.model, options.out, **given)
        if lacking:
            print(
                f"note: {options.out} lacks the {', '.join(lacking)} that fairseq expects inside; "
                "give the files with the options of this command",
                file=sys.stderr,
            )
        print(options.out)
    elif options.command == "to-megatron":
        from digit_ds.model.partition import write_partitioned
        from digit_ds.model.released import read_model

        model = read_model(options.model)
        write_partitioned(options.out, model.spec, model.state, model.provenance, options.tensor_parallel)
        print(f"{options.out}: {options.tensor_parallel} tensor-parallel parts")
    elif options.command == "from-megatron":
        from digit_ds.model.partition import read_partitioned
        from digit_ds.model.released import save_model

        save_model(options.out, *read_partitioned(options.parts))
        print(options.out)
    else:
        from digit_ds.training.export import export

        export(options.run, options.out, ema=options.ema)
        print(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "from-official",
        help="published checkpoint -> released model directory",
        description="Nothing in the checkpoint is run: tensors and plain values are read, and the argparse.Namespace "
        "or omegaconf objects that older files keep their configuration in are read as plain values; anything else "
        "is refused.",
    )
    command.add_argument("checkpoint", metavar="CKPT", help="checkpoint_*.pt of a prior, pixel decoder or VQ baseline")
    command.add_argument("out", metavar="OUT_DIR", help="new model directory")
    command.add_argument("--encoder-out", metavar="PTH", help="also write the encoder it carries, as Meta's .pth files")
    command.add_argument("--codebook-out", metavar="NPY", help="also write the centroids it carries, [K, E]")
    command.add_argument("--vqgan-out", metavar="CKPT", help="also write the VQGAN it carries, as MAGE's .ckpt")
    command.add_argument(
        "--drop-carried",
        action="store_true",
        help="do not keep encoder, codebook and VQGAN beside the model (carried.safetensors), where to-official "
        "finds them again",
    )
    command.add_argument(
        "--grid",
        nargs=2,
        type=int,
        default=(16, 16),
        metavar=("ROWS", "COLUMNS"),
        help="token grid, which checkpoints do not state (published: 16 16)",
    )

    command = commands.add_parser(
        "to-official",
        help="released model directory -> published checkpoint",
        description="fairseq loads a checkpoint strictly only if it holds the frozen encoder, codebook and VQGAN too. "
        "They come from the model directory, where from-official left them (carried.safetensors), or from these files.",
    )
    command.add_argument("model", metavar="MODEL_DIR", help="released model directory")
    command.add_argument("out", metavar="OUT.pt", help="new checkpoint file")
    command.add_argument("--encoder", metavar="PTH", help="DINOv2 checkpoint to put inside")
    command.add_argument("--codebook", metavar="NPY", help="centroids [K, E] to put inside")
    command.add_argument("--vqgan", metavar="CKPT", help="VQGAN checkpoint to put inside")

    command = commands.add_parser("to-megatron", help="released model directory -> tensor-parallel parts")
    command.add_argument("model", metavar="MODEL_DIR", help="released model directory")
    command.add_argument("out", metavar="CKPT_DIR", help="new directory of parts")
    command.add_argument("--tensor-parallel", type=int, required=True, metavar="N", help="number of ranks")

    command = commands.add_parser("from-megatron", help="tensor-parallel parts -> released model directory")
    command.add_argument("parts", metavar="CKPT_DIR", help="directory that to-megatron wrote")
    command.add_argument("out", metavar="OUT_DIR", help="new model directory")

    command = commands.add_parser("from-checkpoint", help="training run or checkpoint -> released model directory")
    command.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints")
    command.add_argument("out", metavar="OUT_DIR", help="new model directory")
    command.add_argument("--ema", action="store_true", help="the moving average of the weights")
    return parser


if __name__ == "__main__":
    run_command(main)
