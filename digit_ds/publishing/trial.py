"""``digit-ds fetch trial``: small random networks in the published formats, for trying commands without a download."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from digit_ds.data.feature_network import save_feature_network
from digit_ds.errors import UserError
from digit_ds.files import sha256, write_atomically, write_json
from digit_ds.model.released import save_model
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.weights import initial_state
from digit_ds.publishing.rows import TRIAL
from digit_ds.tokenizer.codebook import save_codebook
from digit_ds.tokenizer.vqgan_network import VqganNetwork

CLASS_PRIOR = "base_8k_stage1_cls"
"""The class-conditional prior, by the name that ``fetch`` gives the published one."""
NETWORK = "trial_network.safetensors"
"""Feature network in place of Inception."""
WIDTH, DEPTH, PATCH, GRID, CODES, VQ_CODES, LEVELS = 64, 4, 7, 16, 64, 64, 4
"""Half the published image size: pictures of 128 pixels, which the encoder sees at 112, and 16 x 16 tokens."""


def write_trial(folder: Path) -> dict[str, Path]:
    """Write the files of ``digit-ds fetch base``, small and random, to ``folder``; can be repeated after a kill.

    Returns:
        Path of each part.

    Raises:
        UserError: the folder holds other files.
    """
    others = [] if (folder / TRIAL).exists() else sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    if others:
        raise UserError(f"{folder}: holds {others[0]}, expected a new folder for the trial files (--dir)")
    write_json(folder / TRIAL, {"random": True})
    encoder, codebook = folder / "dinov2_vitb14_reg4_pretrain.pth", folder / "km_8k.npy"
    vqgan = folder / "vqgan_of_base_decoder.ckpt"
    write_encoder(encoder, WIDTH, DEPTH, PATCH, GRID)
    origin: dict[str, Any] = {"encoder_sha256": sha256(encoder), "layer": 3}
    generator = torch.Generator().manual_seed(1)
    save_codebook(codebook, torch.randn(CODES, WIDTH, generator=generator), origin)
    write_vqgan(vqgan, VQ_CODES, LEVELS)
    origin["codebook_sha256"] = sha256(codebook)
    unconditional = TransformerSpec(
        kind="prior",
        layers=2,
        width=WIDTH,
        heads=2,
        ffn_width=4 * WIDTH,
        norm_position="post",
        max_positions=2 * GRID * GRID + 2,
        discriminative_codes=CODES,
        grid=(GRID, GRID),
    )
    decoder = replace(unconditional, kind="ar", vq_codes=VQ_CODES)
    models = {
        "base_prior": (unconditional, origin),
        CLASS_PRIOR: (replace(unconditional, classes=1000), origin),
        "base_decoder": (decoder, origin | {"vqgan_sha256": sha256(vqgan)}),
    }
    for seed, (name, (spec, provenance)) in enumerate(models.items()):
        if not (folder / name / "config.json").exists():
            save_model(folder / name, spec, initial_state(spec, seed), provenance)
    if not (folder / NETWORK).exists():
        weights = [torch.randn(16, 64, generator=generator) / 8, torch.randn(8, 16, generator=generator) / 4]
        save_feature_network(folder / NETWORK, weights, [torch.zeros(16), torch.zeros(8)], side=8)
    parts = {"prior": "base_prior", "decoder": "base_decoder", "vqgan": vqgan.name}
    return {part: folder / name for part, name in parts.items()}


def write_encoder(path: Path, width: int, depth: int, patch: int, table: int, seed: int = 0) -> None:
    """Write random weights in the layout of ``dinov2_vitb14_reg4_pretrain.pth``: a ViT with four registers whose
    position table has ``table`` x ``table`` entries.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    state = {
        "cls_token": draw(1, 1, width),
        "register_tokens": draw(1, 4, width),
        "mask_token": draw(1, width),
        "pos_embed": draw(1, 1 + table * table, width),
        "patch_embed.proj.weight": draw(width, 3, patch, patch),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
    }
    for block in range(depth):
        prefix = f"blocks.{block}."
        for norm in ("norm1", "norm2"):
            state |= {f"{prefix}{norm}.weight": 1 + draw(width), f"{prefix}{norm}.bias": draw(width)}
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            state |= {f"{prefix}{name}.weight": draw(rows, columns), f"{prefix}{name}.bias": draw(rows)}
        state |= {f"{prefix}ls1.gamma": 1 + draw(width), f"{prefix}ls2.gamma": 1 + draw(width)}
    write_atomically(path, partial(torch.save, state))


def write_vqgan(path: Path, codes: int, levels: int) -> None:
    """Write a random VQGAN of ``2 ** (levels - 1)`` pixels a token, and its configuration beside it as YAML."""
    ddconfig = {
        "z_channels": 8,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1] * levels,
        "num_res_blocks": 1,
        "resolution": 16 * 2 ** (levels - 1),
        "attn_resolutions": [],
        "dropout": 0.0,
        "double_z": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        state = {"state_dict": VqganNetwork(ddconfig, codes).state_dict()}
    text = yaml.safe_dump({"model": {"params": {"embed_dim": 8, "n_embed": codes, "ddconfig": ddconfig}}})
    write_atomically(path.with_suffix(".yaml"), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_atomically(path, partial(torch.save, state))
