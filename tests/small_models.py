"""A complete set of small random models in released form: priors, pixel decoders and a VQGAN that belong together."""

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from preparation_parts import make_codebook, make_encoder, make_vqgan

from digit_ds.files import sha256
from digit_ds.model.released import save_model
from digit_ds.model.sequences import start_tokens
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.weights import initial_state
from digit_ds.tokenizer.vqgan import VqganNetwork, load_vqgan

GRID, CODES, VQ_CODES, CLASSES = (4, 4), 24, 32, 3
MODERN_LAYERS = {"normalization": "rms", "positions": "rotary2d", "activation": "swiglu", "qk_norm": True}
"""Every choice of a spec that published models do not have."""


def small_spec(kind: str, classes: int = 0) -> TransformerSpec:
    """A transformer of two layers over a 4 x 4 grid."""
    return TransformerSpec(
        kind=kind,
        layers=2,
        width=64,
        heads=2,
        ffn_width=128,
        norm_position="pre",
        max_positions=32,
        discriminative_codes=0 if kind == "vq" else CODES,
        vq_codes=0 if kind == "prior" else VQ_CODES,
        classes=classes,
        grid=GRID,
    )


def random_ids(
    spec: TransformerSpec, batch: int, length: int | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """int64 [batch, length]: any ids of the input table behind a prefix and a start token such as a model expects."""
    rows, first = spec.vocabulary.embedding_rows, spec.vocabulary.prefix_token(torch.tensor(0)).item()
    tokens = torch.randint(rows, (batch, length or spec.sequence_length), generator=generator)
    if spec.prefix_length:
        tokens[:, : spec.prefix_length] = torch.randint(first, rows, (batch, spec.prefix_length), generator=generator)
    labels = torch.arange(batch) % spec.classes if spec.classes else None
    tokens[:, spec.prefix_length] = start_tokens(spec, labels, batch)
    return tokens


def write_models(directory: Path) -> dict[str, Path]:
    """Write prior/, unconditional/, ar/, nar/, vq/, vqgan.ckpt and vqgan.yaml below ``directory``."""
    torch.manual_seed(0)
    ddconfig = {"z_channels": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
    network = VqganNetwork(ddconfig, VQ_CODES)
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": network.state_dict()}, directory / "vqgan.ckpt")
    config = {"model": {"params": {"embed_dim": 8, "n_embed": VQ_CODES, "ddconfig": ddconfig}}}
    (directory / "vqgan.yaml").write_text(yaml.safe_dump(config))
    provenance = {"codebook_sha256": "c" * 64, "encoder_sha256": "e" * 64, "layer": 3}
    pixels = {**provenance, "vqgan_sha256": sha256(directory / "vqgan.ckpt")}
    models = {
        "prior": (small_spec("prior", CLASSES), {**provenance, "classes": ["ant", "bee", "cat"]}),
        "unconditional": (small_spec("prior"), provenance),
        "ar": (small_spec("ar"), pixels),
        "nar": (small_spec("nar"), pixels),
        "vq": (small_spec("vq"), {"vqgan_sha256": pixels["vqgan_sha256"]}),
    }
    for seed, (name, (spec, origin)) in enumerate(models.items()):
        save_model(directory / name, spec, initial_state(spec, seed), origin)
    return {name: directory / name for name in (*models, "vqgan.ckpt", "vqgan.yaml")}


def write_own(directory: Path) -> dict[str, Path]:
    """Write prior/ and ar/ of 8 x 8 tokens with the tokeniser of 32-pixel pictures that they belong to: encoder.pth (of
    two attention heads), km.npy, vqgan.ckpt and vqgan.yaml. By the names of ``load_pipeline``, but for ``ar``.
    """
    encoder = make_encoder(directory / "encoder.pth")
    codebook = make_codebook(directory / "km.npy", encoder, codes=CODES)
    vqgan, config = make_vqgan(directory / "vqgan.ckpt")
    origin = {"encoder_sha256": sha256(encoder), "layer": 3, "codebook_sha256": sha256(codebook)}
    for seed, kind in enumerate(("prior", "ar")):
        spec = replace(small_spec(kind, CLASSES if kind == "prior" else 0), max_positions=128, grid=(8, 8))
        spec = replace(spec, vq_codes=load_vqgan(vqgan, config).codes if kind == "ar" else 0)
        save_model(directory / kind, spec, initial_state(spec, seed), origin | {"classes": ["ant", "bee", "cat"]})
    models = {"prior": directory / "prior", "ar": directory / "ar"}
    return {**models, "encoder": encoder, "codebook": codebook, "vqgan": vqgan, "vqgan_config": config}
