"""The configuration of published models: their names, their options, and how to write one."""

from collections.abc import Mapping
from typing import Any

from digit_ds.model.spec import TransformerSpec
from digit_ds.vocabulary import Kind

KINDS: dict[str, Kind] = {"stlm": "prior", "st2vtlm": "ar", "st2vtlm_nar": "nar", "st2vtlm_vq": "vq"}
MODEL_NAMES = {kind: name for name, kind in KINDS.items()}
PUBLISHED_OPTIONS = {
    "activation_fn": "gelu",
    "decoder_learned_pos": True,
    "no_token_positional_embeddings": False,
    "no_scale_embedding": False,
    "share_decoder_input_output_embed": False,
    "layernorm_embedding": False,
    "no_decoder_final_norm": False,
    "adaptive_input": False,
    "character_embeddings": False,
    "scale_attn": False,
    "scale_fc": False,
    "scale_heads": False,
    "scale_resids": False,
    "base_layers": 0,
}
"""What every published model has; another value would be another network."""


def kind_of(name: object) -> Kind | None:
    """The kind of a model or architecture name (``st2vtlm_nar``, ``stlm_large``, ...); None: not a DiGIT model."""
    known = [model for model in KINDS if name == model or str(name).startswith(f"{model}_")]
    return KINDS[max(known, key=len)] if known else None


def published_cfg(
    spec: TransformerSpec, provenance: Mapping[str, Any], files: Mapping[str, str], encoder_width: int | None
) -> dict[str, Any]:
    """The configuration groups that fairseq rebuilds a model from, for a model that never had any.

    Args:
        spec: the model's sizes.
        provenance: of the model; tells the encoder layer and the image size.
        files: paths of ``encoder``, ``codebook`` and ``vqgan``, which fairseq opens when it builds the model.
        encoder_width: 1024 for ViT-L; anything else is taken for ViT-B.
    """
    options: dict[str, Any] = {
        "_name": MODEL_NAMES[spec.kind],
        **PUBLISHED_OPTIONS,
        **{f"{place}dropout": 0.0 for place in ("", "attention_", "activation_", "relu_")},
        **{f"decoder_{end}_dim": spec.width for end in ("embed", "input", "output")},
        "decoder_ffn_embed_dim": spec.feed_forward,
        "decoder_layers": spec.layers,
        "decoder_attention_heads": spec.heads,
        "decoder_normalize_before": spec.norm_position == "pre",
        "adaptive_softmax_cutoff": None,
        "adaptive_softmax_dropout": 0.0,
        "adaptive_softmax_factor": 4.0,
        "adaptive_input_cutoff": None,
        "adaptive_input_factor": 4.0,
        "tie_adaptive_weights": False,
        "tie_adaptive_proj": False,
        "checkpoint_activations": False,
        "offload_activations": False,
        "decoder_layerdrop": 0.0,
        "decoder_layers_to_keep": None,
        "quant_noise_pq": 0.0,
        "quant_noise_pq_block_size": 8,
        "quant_noise_scalar": 0.0,
        "min_params_to_wrap": 100000000,
        "base_sublayers": 1,
        "base_shuffle": 1 if spec.kind == "prior" else False,
        "decoder_xformers_att_config": None,
        "add_bos_token": False,
        "tokens_per_sample": spec.max_positions,
        "max_target_positions": spec.max_positions,
        "tpu": False,
    }
    if spec.kind != "vq":
        options["pretrained_enc_config"] = {
            "pretrained_enc_arch": "dino_vit_large" if encoder_width == 1024 else "dino_vit_base",
            "pretrained_enc_path": files["encoder"],
            "pretrained_enc_proj_dim": 256,
            "pretrained_enc_withproj": True,
            "layer": provenance.get("layer", 3),
        }
        options["kmeans_path"] = files["codebook"]
    if spec.kind == "prior":
        options["class_conditional"] = spec.classes > 0
    else:
        options["vqgan_ckpt_path"] = files["vqgan"]
        options["vqgan_config_path"] = "vqgan.yaml"
    stage = 1 if spec.kind == "prior" else 2
    return {
        "common": {"seed": 1, "fp16": False, "tpu": False, "user_dir": "fairseq_user"},
        "criterion": {"_name": "ce_loss_ls", "label_smoothing": 0.1, "report_accuracy": False},
        "optimizer": {"_name": "adam", "adam_betas": [0.9, 0.98], "weight_decay": 0.01},
        "lr_scheduler": {"_name": "inverse_sqrt", "warmup_updates": 6250, "warmup_init_lr": 1e-07},
        "model": options,
        "task": {
            "_name": f"image_generation_stage{stage}",
            "data": "images",
            "multi_data": None,
            "input_size": provenance.get("image_size", 256),
            "augmentation": "randcrop",
            "subsample": 1.0,
            "seed": 1,
            "dataset_type": "imagefolder",
            "source_vocab_size": -1 if stage == 1 else spec.discriminative_codes,
            "target_vocab_size": spec.discriminative_codes if stage == 1 else spec.vq_codes,
            "max_target_positions": spec.max_positions,
            "add_bos_token": False,
            "tokens_per_sample": spec.max_positions,
            "num_shards": -1,
            "shard_id": -1,
        }
        | ({"linear_probe": False} if stage == 1 else {"local_cache_path": None}),
    }
