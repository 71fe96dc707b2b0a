"""A complete set of small random models in released form: priors, pixel decoders and a VQGAN that belong together."""

from pathlib import Path

import torch
import yaml

from digit_ds.model.released import save_model
from digit_ds.model.sequences import start_tokens
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.weights import initial_state
from digit_ds.tokenizer.vqgan import VqganNetwork

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
    from digit_ds.files import sha256

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
