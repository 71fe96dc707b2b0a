"""Settings of the conversions between formats of a model."""

from typing import Annotated

from pydantic import Field

from digit_ds.settings import Option, PathText, Section


class FromOfficial(Section):
    """Published (fairseq) checkpoint -> released model directory. Nothing in the checkpoint is run: tensors and plain
    values are read, and the argparse.Namespace or omegaconf objects that older files keep their configuration in are
    read as plain values; anything else is refused.
    """

    checkpoint: Annotated[PathText, Option(positional=True, metavar="CKPT")]
    """checkpoint_*.pt of a prior, pixel decoder or VQ baseline."""
    out: Annotated[PathText, Option(positional=True, metavar="OUT_DIR")]
    """New model directory."""
    encoder_out: Annotated[PathText | None, Option(metavar="PTH")] = None
    """Also write the encoder it carries, as Meta's .pth files."""
    codebook_out: Annotated[PathText | None, Option(metavar="NPY")] = None
    """Also write the centroids it carries, [K, E]."""
    vqgan_out: Annotated[PathText | None, Option(metavar="CKPT")] = None
    """Also write the VQGAN it carries, as MAGE's .ckpt."""
    drop_carried: bool = False
    """Do not keep encoder, codebook and VQGAN beside the model (carried.safetensors), where to-official finds them."""
    grid: Annotated[tuple[int, int], Option(metavar=("ROWS", "COLUMNS"))] = Field((16, 16), strict=False)
    """Token grid, which checkpoints do not state."""


class ToOfficial(Section):
    """Released model directory -> published checkpoint. fairseq loads a checkpoint strictly only if it holds the frozen
    encoder, codebook and VQGAN too. They come from the model directory, where from-official left them
    (carried.safetensors), or from these files.
    """

    model: Annotated[PathText, Option(positional=True, metavar="MODEL_DIR")]
    """Released model directory."""
    out: Annotated[PathText, Option(positional=True, metavar="OUT.pt")]
    """New checkpoint file."""
    encoder: Annotated[PathText | None, Option(metavar="PTH")] = None
    """DINOv2 checkpoint to put inside."""
    codebook: Annotated[PathText | None, Option(metavar="NPY")] = None
    """Centroids [K, E] to put inside."""
    vqgan: Annotated[PathText | None, Option(metavar="CKPT")] = None
    """VQGAN checkpoint to put inside."""


class ToMegatron(Section):
    """Released model directory -> one file for each tensor-parallel rank, to train from."""

    model: Annotated[PathText, Option(positional=True, metavar="MODEL_DIR")]
    """Released model directory."""
    out: Annotated[PathText, Option(positional=True, metavar="CKPT_DIR")]
    """New directory of parts."""
    tensor_parallel: Annotated[int, Option(metavar="N")]
    """Number of ranks."""


class FromMegatron(Section):
    """Tensor-parallel parts -> released model directory."""

    parts: Annotated[PathText, Option(positional=True, metavar="CKPT_DIR")]
    """Directory that to-megatron wrote."""
    out: Annotated[PathText, Option(positional=True, metavar="OUT_DIR")]
    """New model directory."""
