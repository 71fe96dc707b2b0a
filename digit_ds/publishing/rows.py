"""What the published models consist of, and how their files are found.

Known from the published code's documentation are the repository, the encoders' addresses, the codebooks' file names
(``dinov2_base_short_224_l3/km_8k.npy``), the folders ``base_8k_stage1`` and ``base_8k_stage2_400epoch`` and the file
``checkpoint_last.pt`` in them. Where each lies in the repository is documented nowhere, nor is any name of the large
models' checkpoints: so files are looked for in the repository's own list, and what is not plain is asked for.
"""

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from digit_ds.errors import UserError
from digit_ds.publishing.settings import Size

REPOSITORY = "DAMO-NLP-SG/DiGIT"
VQGAN = "vqgan_jax_strongaug.ckpt"
VQGAN_ADDRESS = "https://drive.google.com/file/d/13S_unB87n6KKuuMdyMnyExW0G1kplTbP/view"
"""MAGE's VQGAN; the download needs a browser."""
LAST = "checkpoint_last.pt"
TRIAL = "trial.json"
"""File in a folder of random trial networks."""


class Row(NamedTuple):
    """One size of the published models."""

    codebook: str
    """File name."""
    encoder: str
    """Address of the weights."""
    top_k: int
    """Published choice for drawing from the prior (paper, appendix)."""
    prior: tuple[str, ...]
    """Documented folders of the unconditional prior."""
    decoder: tuple[str, ...]
    """Documented folders of the autoregressive pixel decoder."""


_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
ROWS: dict[Size, Row] = {
    "base": Row(
        "km_8k.npy",
        f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        200,
        ("base_8k_stage1",),
        ("base_8k_stage2_400epoch",),
    ),
    "large": Row("km_16k.npy", f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", 400, (), ()),
}


def find_checkpoint(names: Iterable[str], size: Size, part: str, wanted: str | None, origin: str) -> str:
    """The checkpoint of a size's ``prior`` or ``decoder`` among the files ``names``.

    A documented folder comes first; else it is the only ``.pt`` file whose path names size and stage; and of several
    files in one folder the one that the published scripts read.

    Raises:
        UserError: there is none, or more than one; names those there are.
    """
    checkpoints = sorted(name for name in names if name.endswith(".pt"))
    if wanted is not None:
        if wanted not in checkpoints:
            raise UserError(f"{origin}: has no checkpoint {wanted}, expected one of {_list(checkpoints)}")
        return wanted
    stage = "stage1" if part == "prior" else "stage2"
    found = [name for name in checkpoints if size in name.lower() and stage in name.lower()]
    for folder in ROWS[size].prior if part == "prior" else ROWS[size].decoder:
        if documented := [name for name in found if folder in name.removesuffix(".pt").split("/")]:
            found = documented
            break
    found = [name for name in found if PurePosixPath(name).name == LAST] or found
    if len(found) != 1:
        several = "none of its checkpoints" if not found else f"{len(found)} of its checkpoints"
        raise UserError(
            f"{origin}: {several} may be the {size} {part} by name, expected one; name it with --{part}, one of "
            f"{_list(found or checkpoints)}"
        )
    return found[0]


def find_file(names: Iterable[str], name: str, origin: str) -> str:
    """The path of the only file that is called ``name``.

    Raises:
        UserError: there is none, or more than one.
    """
    found = sorted(path for path in names if PurePosixPath(path).name == name)
    if len(found) != 1:
        raise UserError(f"{origin}: has {_list(found)} by the name of {name}, expected one such file")
    return found[0]


def folder_of(size: Size, part: str, wanted: str | None) -> str:
    """Name of the model directory that a checkpoint is converted to."""
    if wanted is None:
        return f"{size}_{part}"
    telling = [word for word in PurePosixPath(wanted).with_suffix("").parts if word not in _EVERYWHERE]
    return "_".join(telling) or f"{size}_{part}"


_EVERYWHERE = ("/", "..", "outputs", "checkpoints", "checkpoint_last")


def _list(names: list[str]) -> str:
    """Names in a line of bounded length."""
    return "no file" if not names else ", ".join(names[:12]) + (f" and {len(names) - 12} others" if names[12:] else "")
