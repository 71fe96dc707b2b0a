"""Settings of the conversions between formats of a model."""

from typing import Annotated

from pydantic import Field

from digit_ds.settings import Option, PathText, Section


class FromOfficial(Section):
    """Convert a published (fairseq) checkpoint to a released model directory. No code in the checkpoint is executed:
    tensors and plain values are read, and argparse.Namespace or omegaconf objects, the configuration in older files,
    are read as plain values; any other object is refused.
    """

    checkpoint: Annotated[PathText, Option(positional=True, metavar="CKPT")]
    """checkpoint_*.pt of a prior, pixel decoder or VQ baseline."""
    out: Annotated[PathText, Option(positional=True, metavar="OUT_DIR")]
    """New model directory."""
    encoder_out: Annotated[PathText | None, Option(metavar="PTH")] = None
    """Also write the encoder in the checkpoint, in the format of Meta's .pth files."""
    codebook_out: Annotated[PathText | None, Option(metavar="NPY")] = None
    """Also write the codebook in the checkpoint, .npy [K, E]."""
    vqgan_out: Annotated[PathText | None, Option(metavar="CKPT")] = None
    """Also write the VQGAN in the checkpoint, in the format of MAGE's .ckpt."""
    drop_carried: bool = False
    """Do not store encoder, codebook and VQGAN beside the model (carried.safetensors); to-official reads them there."""
    grid: Annotated[tuple[int, int], Option(metavar=("ROWS", "COLUMNS"))] = Field((16, 16), strict=False)
    """Size of the token grid, which checkpoints do not state."""


class ToOfficial(Section):
    """Convert a released model directory to a published (fairseq) checkpoint. fairseq loads a checkpoint strictly only
    if it also holds the frozen encoder, codebook and VQGAN. They are read from the model directory, where
    from-official stores them (carried.safetensors), or from the files given.
    """

    model: Annotated[PathText, Option(positional=True, metavar="MODEL_DIR")]
    """Released model directory."""
    out: Annotated[PathText, Option(positional=True, metavar="OUT.pt")]
    """New checkpoint file."""
    encoder: Annotated[PathText | None, Option(metavar="PTH")] = None
    """DINOv2 weights to include."""
    codebook: Annotated[PathText | None, Option(metavar="NPY")] = None
    """Codebook .npy [K, E] to include."""
    vqgan: Annotated[PathText | None, Option(metavar="CKPT")] = None
    """VQGAN checkpoint to include."""


class ToMegatron(Section):
    """Convert a released model directory to one file for each tensor-parallel rank, to train from."""

    model: Annotated[PathText, Option(positional=True, metavar="MODEL_DIR")]
    """Released model directory."""
    out: Annotated[PathText, Option(positional=True, metavar="CKPT_DIR")]
    """New directory of tensor-parallel parts."""
    tensor_parallel: Annotated[int, Option(metavar="N")] = Field(ge=1)
    """Tensor-parallel size: number of ranks."""


class FromMegatron(Section):
    """Convert tensor-parallel parts to a released model directory."""

    parts: Annotated[PathText, Option(positional=True, metavar="CKPT_DIR")]
    """Directory that to-megatron wrote."""
    out: Annotated[PathText, Option(positional=True, metavar="OUT_DIR")]
    """New model directory."""
