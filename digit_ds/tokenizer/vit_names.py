"""Names of tensors in Hugging Face's files and in Meta's of DINOv3 -> those of DINOv2's files.

=========================================================  =========  =========================================
class of transformers                                      layout     what is left aside
=========================================================  =========  =========================================
``Dinov2Model``, ``Dinov2WithRegistersModel``              DINOv2     ``mask_token``, heads
``DINOv3ViTModel``                                         DINOv3     ``mask_token``
``SiglipVisionModel``, ``SiglipModel``,                    SigLIP     pooling head, text tower, logit scale
``Siglip2VisionModel``, ``Siglip2Model``
=========================================================  =========  =========================================

The prefix under which a larger model keeps them (``dinov2.``, ``vision_model.``) is found, and what is not under it is
left aside. Names that no row explains are kept: the strict loading refuses them.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_PREFIX = re.compile(r"^(|.*\.)embeddings\.(?:cls_token|patch_embedding\.weight)$")
_BLOCK = r"^(?:encoder\.|model\.)?layers?\.(\d+)\."

_SHARED = {
    r"^embeddings\.cls_token$": "cls_token",
    r"^embeddings\.register_tokens$": "register_tokens",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.(?:projection\.)?": "patch_embed.proj.",
    _BLOCK: r"blocks.\1.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
}
_RENAMED = {
    "DINOv2": {
        **_SHARED,
        r"\.attention\.attention\.(query|key|value)\.": r".attn.\1.",
        r"\.attention\.output\.dense\.": ".attn.proj.",
        r"\.mlp\.weights_in\.": ".mlp.fc1.",
        r"\.mlp\.weights_out\.": ".mlp.fc2.",
        r"^layernorm\.": "norm.",
    },
    "DINOv3": {
        **_SHARED,
        r"^storage_tokens$": "register_tokens",
        r"\.attention\.q_proj\.": ".attn.query.",
        r"\.attention\.k_proj\.": ".attn.key.",
        r"\.attention\.v_proj\.": ".attn.value.",
        r"\.attention\.o_proj\.": ".attn.proj.",
        r"\.mlp\.(?:gate_proj|w1)\.": ".mlp.gate.",
        r"\.mlp\.(?:up_proj|w2)\.": ".mlp.up.",
        r"\.mlp\.(?:down_proj|w3)\.": ".mlp.fc2.",
    },
    "SigLIP": {
        r"^embeddings\.position_embedding\.weight$": "pos_embed",
        r"^embeddings\.patch_embedding\.": "patch_embed.proj.",
        _BLOCK: r"blocks.\1.",
        r"\.layer_norm([12])\.": r".norm\1.",
        r"\.self_attn\.q_proj\.": ".attn.query.",
        r"\.self_attn\.k_proj\.": ".attn.key.",
        r"\.self_attn\.v_proj\.": ".attn.value.",
        r"\.self_attn\.out_proj\.": ".attn.proj.",
        r"^post_layernorm\.": "norm.",
    },
}
_LEFT_ASIDE = {
    "DINOv2": re.compile(r"^embeddings\.mask_token$|^classifier\."),
    # Norms of the class token alone, which the patches never see.
    "DINOv3": re.compile(r"^(?:embeddings\.)?mask_token$|\.bias_mask$|^(?:local_)?cls_norm\."),
    "SigLIP": re.compile(r"^embeddings\.position_ids$|^head\."),
}


def huggingface_layout(names: Iterable[str]) -> tuple[str, str] | None:
    """Layout and prefix of a file of transformers; None: none that is known, such as CLIP's."""
    names = set(names)
    prefix = next((found[1] for name in sorted(names) if (found := _PREFIX.match(name))), None)
    if prefix is None:
        return None
    bare = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if "embeddings.patch_embedding.weight" in bare:
        known = "embeddings.class_embedding" not in bare and "post_layernorm.weight" in bare
        return ("SigLIP", prefix) if known else None
    if not any(name.endswith("layer_scale1.lambda1") for name in bare):
        return None
    return ("DINOv2" if "embeddings.position_embeddings" in bare else "DINOv3"), prefix


def rename(layout: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of ``layout``, without their prefix, under DINOv2's names; those left aside are not."""
    found = {}
    for name, value in state.items():
        if not _LEFT_ASIDE[layout].search(name):
            for pattern, replacement in _RENAMED[layout].items():
                name = re.sub(pattern, replacement, name)
            found[name] = value
    if layout == "DINOv3":
        _plain_mlp(found)
        _without_key_bias(found)
    for parts, whole in ((("query", "key", "value"), "qkv"), (("gate", "up"), "fc1")):
        _join(found, parts, whole)
    if layout == "SigLIP":
        _as_convolution(found)
    return found


def _plain_mlp(state: dict[str, Tensor]) -> None:
    """An ``up`` without a ``gate`` is the first matrix of an MLP."""
    for name in list(state):
        if ".mlp.up." in name and name.replace(".up.", ".gate.") not in state:
            state[name.replace(".up.", ".fc1.")] = state.pop(name)


def _without_key_bias(state: dict[str, Tensor]) -> None:
    """DINOv3 has no bias of the keys: Meta's files mask it, Hugging Face's lack it. It is replaced by zeros."""
    for name in list(state):
        if name.endswith(".attn.query.bias"):
            state.setdefault(name.replace(".query.", ".key."), torch.zeros_like(state[name]))
        elif name.endswith(".attn.qkv.bias") and state[name].ndim == 1:
            third = len(state[name]) // 3
            state[name] = torch.cat([state[name][:third], state[name].new_zeros(third), state[name][2 * third :]])


def _join(state: dict[str, Tensor], parts: tuple[str, ...], whole: str) -> None:
    """One matrix of several, rows below rows; parts that do not fit stay for the strict loading to complain about."""
    first = f".{parts[0]}."
    for name in [name for name in state if first in name]:
        names = [name.replace(first, f".{part}.") for part in parts]
        shapes = {tuple(state[part].shape[1:]) if part in state and state[part].ndim else None for part in names}
        if len(shapes) == 1 and None not in shapes:
            state[name.replace(first, f".{whole}.")] = torch.cat([state.pop(part) for part in names])


def _as_convolution(state: dict[str, Tensor]) -> None:
    """A position table [G, E] -> [1, G, E]; NaFlex's matrix [E, p * p * 3] of patches -> [E, 3, p, p]."""
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][None]
    weight = state.get("patch_embed.proj.weight")
    if weight is not None and weight.ndim == 2:
        side = math.isqrt(weight.shape[1] // 3)
        if weight.shape[1] == 3 * side * side > 0:
            state["patch_embed.proj.weight"] = weight.reshape(-1, side, side, 3).permute(0, 3, 1, 2)
