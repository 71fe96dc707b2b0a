"""Vision-transformer checkpoints as their authors published them, brought to one set of names.

The names are those of DINOv2's files, which timm's ``VisionTransformer`` shares: ``patch_embed.proj``,
``blocks.{i}.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}``, ``norm``.

==========  ======================================================  =============================
layout      where the weights lie                                   what is left aside
==========  ======================================================  =============================
DINOv2      the file is the state dict; ``model``; or ``teacher``    ``mask_token``, ``head.*``,
            (or ``student``), there ``backbone.*``                  ``dino_head.*``, ``ibot_head.*``
MAE         ``model``                                               ``mask_token``, ``decoder_*``
MoCo v3     ``state_dict``, there ``module.base_encoder.*``         other networks, ``head.*``
iBOT        ``state_dict``; or ``teacher``, there ``backbone.*``    ``masked_embed``, ``head.*``
DINOv3      as DINOv2; the names, and those of Hugging Face's       ``vit_names`` says
            files of DINOv2, DINOv3 and SigLIP: ``vit_names``
==========  ======================================================  =============================

A file is safetensors or of ``torch.save``. People wrap the same weights in different ways, so the layout is told by the
tensors: DINOv3 alone has ``rope_embed.periods`` or ``storage_tokens``, else only DINOv2 has LayerScale (``ls1.gamma``)
or registers, and its bare file holds no other network.
"""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from digit_ds.errors import UserError
from digit_ds.safe_load import is_safetensors, load_torch, open_tensors
from digit_ds.tokenizer.vit_names import huggingface_layout, rename

_LEFT_ASIDE = ("mask_token", "masked_embed", "head.", "decoder_", "dino_head.", "ibot_head.")
_MOCO_PREFIXES = ("module.base_encoder.", "module.momentum_encoder.")
_PREFIXES = ("module.backbone.", "backbone.", "module.", "")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
"""DINOv2's training files number a chunk of blocks before each block."""
_RENAMED = {
    # DINOv2 ViT-g/14 names the two matrices of its gated MLP otherwise than timm.
    ".mlp.w12.": ".mlp.fc1.",
    ".mlp.w3.": ".mlp.fc2.",
    # Some MoCo v3 ViT-L files misname four layers.
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}

_NEEDED = {"cls_token": "SigLIP", "pos_embed": "DINOv3", "patch_embed.proj.weight": "", "blocks.0.mlp.fc1.weight": ""}
"""Tensors that every checkpoint has, but for those of one layout."""


@dataclass
class VitCheckpoint:
    """The float32 weights of one vision transformer and the sizes that can be read off them."""

    layout: str  # a key of ``FAMILIES``
    state: dict[str, torch.Tensor]  # patch_embed.*, blocks.*, norm.*
    prefix: torch.Tensor  # [1, P, E]: class token with its position, registers; P = 0 for SigLIP
    registers: int
    positions: torch.Tensor  # [1, table * table, E] of the patches
    periods: (
        torch.Tensor | None
    )  # of rotary positions, float32 [D / 4] for heads of D channels; where the file has them
    width: int
    depth: int
    patch_size: int
    table: int  # the position table is table x table; 0 for rotary positions
    hidden: int  # outputs of the MLP's first matrix
    gated: bool  # SwiGLU instead of GELU


def read_vit_checkpoint(path: Path | str) -> VitCheckpoint:
    """Read a checkpoint of DINOv2, DINOv3, SigLIP, MAE, MoCo v3 or iBOT.

    The training files of MAE and iBOT hold an ``argparse.Namespace`` of settings: that class alone is let in beside
    tensors and plain values.

    Raises:
        UserError: the file is no such checkpoint.
    """
    layout, state, names = _find_state(_load(Path(path)))
    for needed, lacking in _NEEDED.items():
        if needed not in state and layout != lacking:
            found = f"{len(names)} tensors such as {names[0]}" if names else "no tensors"
            raise UserError(
                f"{path}: has no {needed} but {found}, expected a vision transformer in the layout of a DINOv2, "
                "DINOv3, SigLIP, MAE, MoCo v3 or iBOT checkpoint"
            )
    patches, up = state["patch_embed.proj.weight"], state["blocks.0.mlp.fc1.weight"]
    width, patch_size = len(patches), patches.shape[-1]
    periods = state.pop("rope_embed.periods", None)
    registers = state.pop("register_tokens", patches.new_zeros(1, 0, width))
    tokens = 0 if layout == "SigLIP" else 1  # class tokens
    class_token = state.pop("cls_token", patches.new_zeros(1, 0, width))
    positions = patches.new_zeros(1, tokens, width) if layout == "DINOv3" else state.pop("pos_embed")
    rows = positions.shape[1] - tokens if positions.ndim == 3 else 0
    table = math.isqrt(rows) if rows > 0 else int(layout != "DINOv3")
    for name, value, expected in (
        ("patch_embed.proj.weight", patches, (width, 3, patch_size, patch_size)),
        ("cls_token", class_token, (1, tokens, width)),
        ("register_tokens", registers, (1, registers.shape[-2] if registers.ndim > 1 else 0, width)),
        ("pos_embed", positions, (1, tokens + table * table, width)),
        ("rope_embed.periods", periods, (periods.numel(),) if periods is not None else None),
    ):
        if value is not None and value.shape != expected:
            raise UserError(f"{path}: {name} has shape {list(value.shape)}, expected {list(expected or ())}")
    down = state.get("blocks.0.mlp.fc2.weight", up.T)
    return VitCheckpoint(
        layout=layout,
        state=state,
        # Positions are added to the class token, registers get none.
        prefix=torch.cat([class_token + positions[:, :tokens], registers], 1),
        registers=registers.shape[1],
        positions=positions[:, tokens:],
        periods=periods,
        width=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        patch_size=patch_size,
        table=table,
        hidden=len(up),
        gated=len(up) == 2 * down.shape[-1],
    )


def _load(path: Path) -> Any:
    """What the file holds; of safetensors without the text towers, which can outweigh the rest."""
    if not is_safetensors(path):
        return load_torch(path, allow=[argparse.Namespace])
    with open_tensors(path) as file:
        names = [name for name in file.keys() if not name.startswith("text_model.")]  # noqa: SIM118  # no mapping
        return {name: file.get_tensor(name) for name in names}


def _find_state(content: Any) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    """The layout's name, the backbone's tensors, float32, under DINOv2's names, and what all are called in the file."""
    layout, state = "DINOv2", content
    if isinstance(content, dict):
        for key, name in (("teacher", "iBOT"), ("student", "iBOT"), ("model", "MAE"), ("state_dict", "iBOT")):
            if isinstance(content.get(key), dict):
                layout, state = name, content[key]
                break
    if not isinstance(state, dict):
        return layout, {}, []
    names = [name for name in state if isinstance(name, str) and isinstance(state[name], torch.Tensor)]
    if known := huggingface_layout(names):
        layout, prefix = known
        return layout, rename(layout, _under(prefix, names, state)), names
    prefixes: tuple[str, ...] = ("",) if layout == "DINOv2" else _PREFIXES
    if any(name.startswith(_MOCO_PREFIXES) for name in names):
        layout, prefixes = "MoCo v3", _MOCO_PREFIXES
    elif any(name.endswith(("rope_embed.periods", "storage_tokens")) for name in names):
        layout = "DINOv3"
    elif any(name.endswith((".ls1.gamma", "register_tokens")) for name in names):
        layout = "DINOv2"
    prefix = next((prefix for prefix in prefixes if prefix + "cls_token" in state), prefixes[-1])
    found = {}
    for name, value in _under(prefix, names, state).items():
        if name.startswith(_LEFT_ASIDE):
            continue
        name = _CHUNKED.sub(r"blocks.\1.", name)
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        found[name] = value
    return layout, rename(layout, found) if layout == "DINOv3" else found, names


def _under(prefix: str, names: list[str], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under ``prefix``, float32 and without it."""
    return {name.removeprefix(prefix): state[name].float() for name in names if name.startswith(prefix)}
