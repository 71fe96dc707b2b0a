"""The published-format checkpoints among the golden data, as lean models."""

from pathlib import Path

import torch

from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import Transformer
from digit_ds.model.weights import from_official_names, fuse_qkv

GOLDEN = Path(__file__).parent / "golden"
KINDS = {"stlm": "prior", "st2vtlm": "ar", "st2vtlm_nar": "nar", "st2vtlm_vq": "vq"}


def by_our_names(official: dict[str, torch.Tensor], spec: TransformerSpec) -> dict[str, torch.Tensor]:
    """Published decoder tensors by our names, query, key and value joined."""
    found = from_official_names(official, spec, "published").items()
    return {name: parts[0] if len(parts) == 1 else fuse_qkv(parts, spec.heads) for name, parts in found}


def golden_model(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a golden folder, its sizes read from its tensors and its stored configuration."""
    checkpoint = torch.load(GOLDEN / name / "checkpoint_last.pt", weights_only=True)
    config, state = checkpoint["cfg"]["model"], checkpoint["model"]
    decoder = {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")}
    decoder.pop("version", None)
    kind = KINDS[config["_name"]]
    rows, written = len(decoder["embed_tokens.weight"]), len(decoder["output_projection.weight"])
    spec = TransformerSpec(
        kind=kind,
        layers=config["decoder_layers"],
        width=config["decoder_embed_dim"],
        heads=config["decoder_attention_heads"],
        ffn_width=config["decoder_ffn_embed_dim"],
        norm_position="pre" if config["decoder_normalize_before"] else "post",
        max_positions=len(decoder["embed_positions.weight"]) - 2,
        discriminative_codes={"prior": written - 5, "vq": 0}.get(kind, rows - written - 5),
        vq_codes=0 if kind == "prior" else written - 5,
        classes=rows - written if kind == "prior" else 0,
        grid=(16, 16),
    )
    model = Transformer(spec)
    model.load_state_dict(by_our_names(decoder, spec))
    return model.to(dtype).eval().requires_grad_(False)
