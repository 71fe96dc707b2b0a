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
==========  ======================================================  =============================

People wrap the same weights in different ways, so the layout is told by the tensors: only DINOv2 has LayerScale
(``ls1.gamma``) or registers, and its bare file holds no other network.
"""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from digit_ds.errors import UserError
from digit_ds.safe_load import load_torch

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


@dataclass
class VitCheckpoint:
    """The float32 weights of one vision transformer and the sizes that can be read off them."""

    layout: str  # a key of the table above
    state: dict[str, torch.Tensor]  # patch_embed.*, blocks.*, norm.*
    class_token: torch.Tensor  # [1, 1, E]
    registers: torch.Tensor  # [1, R, E]
    positions: torch.Tensor  # [1, 1 + table * table, E], the class token's first
    width: int
    depth: int
    patch_size: int
    table: int  # the position table is table x table
    hidden: int  # outputs of the MLP's first matrix
    gated: bool  # SwiGLU instead of GELU


def read_vit_checkpoint(path: Path | str) -> VitCheckpoint:
    """Read a published DINOv2, MAE, MoCo v3 or iBOT checkpoint.

    The training files of MAE and iBOT hold an ``argparse.Namespace`` of settings: that class alone is let in beside
    tensors and plain values.

    Raises:
        UserError: the file is no such checkpoint.
    """
    layout, state = _find_state(load_torch(path, allow=[argparse.Namespace]))
    for needed in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if needed not in state:
            raise UserError(
                f"{path}: has no {needed}, expected a vision transformer in the layout of a DINOv2, MAE, MoCo v3 or "
                "iBOT checkpoint"
            )
    class_token, positions = state.pop("cls_token"), state.pop("pos_embed")
    patches, up = state["patch_embed.proj.weight"], state["blocks.0.mlp.fc1.weight"]
    width, patch_size = len(patches), patches.shape[-1]
    registers = state.pop("register_tokens", patches.new_zeros(1, 0, width))
    table = math.isqrt(positions.shape[1] - 1) if positions.ndim == 3 and positions.shape[1] > 1 else 1
    for name, value, expected in (
        ("patch_embed.proj.weight", patches, (width, 3, patch_size, patch_size)),
        ("cls_token", class_token, (1, 1, width)),
        ("register_tokens", registers, (1, registers.shape[-2] if registers.ndim > 1 else 0, width)),
        ("pos_embed", positions, (1, 1 + table * table, width)),
    ):
        if value.shape != expected:
            raise UserError(f"{path}: {name} has shape {list(value.shape)}, expected {list(expected)}")
    down = state.get("blocks.0.mlp.fc2.weight", up.T)
    return VitCheckpoint(
        layout=layout,
        state=state,
        class_token=class_token,
        registers=registers,
        positions=positions,
        width=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        patch_size=patch_size,
        table=table,
        hidden=len(up),
        gated=len(up) == 2 * down.shape[-1],
    )


def _find_state(content: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """The layout's name and the backbone's tensors, float32, under DINOv2's names; empty where there is none."""
    layout, state = "DINOv2", content
    if isinstance(content, dict):
        for key, name in (("teacher", "iBOT"), ("student", "iBOT"), ("model", "MAE"), ("state_dict", "iBOT")):
            if isinstance(content.get(key), dict):
                layout, state = name, content[key]
                break
    if not isinstance(state, dict):
        return layout, {}
    names = [name for name in state if isinstance(name, str) and isinstance(state[name], torch.Tensor)]
    prefixes: tuple[str, ...] = ("",) if layout == "DINOv2" else _PREFIXES
    if any(name.startswith(_MOCO_PREFIXES) for name in names):
        layout, prefixes = "MoCo v3", _MOCO_PREFIXES
    elif any(name.endswith((".ls1.gamma", "register_tokens")) for name in names):
        layout = "DINOv2"
    prefix = next((prefix for prefix in prefixes if prefix + "cls_token" in state), prefixes[-1])
    found = {}
    for name in names:
        bare = name.removeprefix(prefix)
        if not name.startswith(prefix) or bare.startswith(_LEFT_ASIDE):
            continue
        bare = _CHUNKED.sub(r"blocks.\1.", bare)
        for old, new in _RENAMED.items():
            bare = bare.replace(old, new)
        found[bare] = state[name].float()
    return layout, found
