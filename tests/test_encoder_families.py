"""DINOv2, DINOv3 and SigLIP from the files that people have: the numbers are transformers' and timm's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_reference import MEAN, STD, random_vit, resample
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

import digit_ds
from digit_ds.errors import UserError
from digit_ds.tokenizer.codebook import save_codebook
from digit_ds.tokenizer.tokenizer import Tokenizer

WEIGHTS = Path(__file__).parent / "golden" / "dinov2" / "dinov2_reg4_tiny.pth"
HALF = torch.full((3, 1, 1), 0.5)
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
HEADS = 2


def randomised(model):
    """The model with no parameter at an initial value, in which a norm or a bias might be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def pictures(size):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def dinov2(kind=Dinov2Model, config=Dinov2Config, **options):
    return kind(config(**SIZES, image_size=56, patch_size=14, **options))


def dinov3(**options):
    return DINOv3ViTModel(DINOv3ViTConfig(**SIZES, intermediate_size=80, num_register_tokens=4, **options))


def siglip(patch=16, table=14):
    config = {**SIZES, "intermediate_size": 72, "patch_size": patch, "image_size": patch * table}
    return SiglipVisionModel(SiglipVisionConfig(**config))


def siglip_with_text():
    vision = {**SIZES, "intermediate_size": 72, "patch_size": 16, "image_size": 256}
    return SiglipModel(SiglipConfig(vision_config=vision, text_config={**SIZES, "vocab_size": 16}))


def registers(**options):
    return dinov2(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, **options)


def outputs(model, images, **options):
    """What transformers gives for each block after the final norm, for the patches: a list of [B, G, E]."""
    model = getattr(model, "vision_model", getattr(model, "dinov2", model))
    norm = next(getattr(model, name) for name in ("norm", "layernorm", "post_layernorm") if hasattr(model, name))
    blocks = []
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: blocks.append(out if torch.is_tensor(out) else out[0]))
        for layer in layers
    ]
    with torch.no_grad():
        model(images, **options)
        for hook in hooks:
            hook.remove()
        patches = (images.shape[-1] // model.config.patch_size) ** 2 if images.ndim == 4 else images.shape[1]
        return [norm(block)[:, -patches:] for block in blocks]


@pytest.mark.parametrize(
    ("make", "size", "layout", "mean", "std"),
    [
        (dinov2, 56, "DINOv2", MEAN, STD),
        (lambda: dinov2(use_swiglu_ffn=True), 56, "DINOv2", MEAN, STD),
        (lambda: dinov2(Dinov2ForImageClassification), 56, "DINOv2", MEAN, STD),
        (registers, 56, "DINOv2", MEAN, STD),
        (lambda: registers(use_swiglu_ffn=True), 56, "DINOv2", MEAN, STD),
        (dinov3, 256, "DINOv3", MEAN, STD),
        (lambda: dinov3(use_gated_mlp=True, hidden_act="silu"), 256, "DINOv3", MEAN, STD),
        (siglip, 224, "SigLIP", HALF, HALF),
        (siglip_with_text, 256, "SigLIP", HALF, HALF),
    ],
    ids=["v2", "v2-g", "v2-head", "v2-reg", "v2-reg-g", "v3", "v3-gated", "siglip", "siglip-text"],
)
def test_features_are_those_of_transformers(make, size, layout, mean, std, tmp_path):
    model = randomised(make())
    weights, images = saved(model, tmp_path), pictures(size)
    for layer, expected in enumerate(reversed(outputs(model, (images - mean) / std)), 1):
        encoder = digit_ds.load_encoder(weights, layer=layer, num_heads=HEADS)
        torch.testing.assert_close(encoder(images), expected, atol=2e-5, rtol=0)
    identity = encoder.provenance()
    assert identity["architecture"].startswith(f"{layout} width 32 depth 3 heads 2 patch ")
    assert ("rotary" in identity["architecture"]) == (layout == "DINOv3")
    assert identity["transform"].startswith("mean and deviation 0.5" if layout == "SigLIP" else "ImageNet mean")


def test_naflex_siglip_is_a_vision_transformer_of_256_pixels(tmp_path):
    config = Siglip2VisionConfig(**SIZES, intermediate_size=72, num_patches=256, patch_size=16)
    model, images = randomised(Siglip2VisionModel(config)), pictures(256)
    encoder = digit_ds.load_encoder(saved(model, tmp_path), layer=1, num_heads=HEADS)
    assert encoder.image_sizes == (256,)
    normalised = ((images - HALF) / HALF).permute(0, 2, 3, 1).numpy()
    patches = torch.stack([torch.from_numpy(convert_image_to_patches(image, 16)) for image in normalised])
    options = {"attention_mask": torch.ones(2, 256), "spatial_shapes": torch.full((2, 2), 16)}
    expected = outputs(model, patches, **options)[-1]
    torch.testing.assert_close(encoder(images), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("patch", "table", "sizes", "image", "grid"),
    [
        (16, 14, (224, 256), 256, 16),
        (16, 24, (384,), 384, 24),
        (14, 27, (384,), 384, 27),
        (14, 16, (224, 256), 256, 16),
    ],
)
def test_image_sizes_of_siglip(patch, table, sizes, image, grid, tmp_path):
    """256 for 224: the table scaled as in transformers, or the image shrunk where patches of 14 do not divide it."""
    model = randomised(siglip(patch, table))
    encoder = digit_ds.load_encoder(saved(model, tmp_path), layer=1, num_heads=HEADS)
    assert (encoder.image_sizes, encoder.grid(image)) == (sizes, (grid, grid))
    normalised = (pictures(image) - HALF) / HALF
    if image == 256 and patch == 14:
        shrunk = resample(normalised.double(), 224, 1 / 0.875).float()
        normalised = encoder.preprocess(pictures(image))
        torch.testing.assert_close(normalised, shrunk, atol=1e-4, rtol=0)
    expected = outputs(model, normalised, interpolate_pos_encoding=True)[-1]
    torch.testing.assert_close(encoder(pictures(image)), expected, atol=2e-5, rtol=0)


def as_meta(state, periods):
    """A state dict of ``DINOv3ViTModel`` as Meta's ``dinov3_vitb16_pretrain_lvd1689m-*.pth`` has it."""
    meta = {"rope_embed.periods": periods, "mask_token": state["embeddings.mask_token"][0]}
    meta |= {"cls_token": state["embeddings.cls_token"], "storage_tokens": state["embeddings.register_tokens"]}
    meta |= {f"patch_embed.proj.{kind}": state[f"embeddings.patch_embeddings.{kind}"] for kind in ("weight", "bias")}
    meta |= {f"norm.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}
    meta |= {f"local_cls_norm.{kind}": torch.ones(32) for kind in ("weight", "bias")}
    for index in range(3):
        old, new = f"layer.{index}", f"blocks.{index}"
        parts = [state.get(f"{old}.attention.{part}_proj.bias", torch.full((32,), 7.0)) for part in "qkv"]
        meta[f"{new}.attn.qkv.weight"] = torch.cat([state[f"{old}.attention.{part}_proj.weight"] for part in "qkv"])
        meta |= {f"{new}.attn.qkv.bias": torch.cat(parts), f"{new}.attn.qkv.bias_mask": torch.ones(96)}
        meta[f"{new}.attn.qkv.bias_mask"][32:64] = 0
        for number in (1, 2):
            meta[f"{new}.ls{number}.gamma"] = state[f"{old}.layer_scale{number}.lambda1"]
        renamed = {"norm1": "norm1", "norm2": "norm2", "attention.o_proj": "attn.proj"}
        gated = f"{old}.mlp.gate_proj.weight" in state
        mlp = (
            {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
        )
        for part, name in (renamed | {f"mlp.{part}": f"mlp.{name}" for part, name in mlp.items()}).items():
            meta |= {f"{new}.{name}.{kind}": state[f"{old}.{part}.{kind}"] for kind in ("weight", "bias")}
    return meta


@pytest.mark.parametrize("gated", [False, True])
def test_metas_dinov3_files_are_read_as_huggingfaces(gated, tmp_path):
    weights = saved(randomised(dinov3(use_gated_mlp=gated, hidden_act="silu" if gated else "gelu")), tmp_path)
    meta = as_meta(load_file(weights), 100 ** (torch.arange(4) / 4))
    torch.save(meta, tmp_path / "bare.pth")
    torch.save({"teacher": {f"backbone.{name}": value for name, value in meta.items()}}, tmp_path / "run.pth")
    expected = digit_ds.load_encoder(weights, layer=2, num_heads=HEADS)(pictures(256))
    for name in ("bare.pth", "run.pth"):
        encoder = digit_ds.load_encoder(tmp_path / name, layer=2)  # number of heads from the periods
        assert (encoder.num_heads, encoder.image_sizes) == (HEADS, (256,))
        torch.testing.assert_close(encoder(pictures(256)), expected, atol=2e-5, rtol=0)


def test_timm_reads_the_same_network_from_metas_dinov3_file(tmp_path):
    """A second witness of the names and of the rotation; its periods are those of the file, not of the default base."""
    from timm.models.eva import Eva, checkpoint_filter_fn

    meta = as_meta(load_file(saved(randomised(dinov3()), tmp_path)), 50 ** (torch.arange(4) / 4))
    torch.save(meta, tmp_path / "meta.pth")
    peer = Eva(
        **{"img_size": 256, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0},
        **{"mlp_ratio": 2.5, "qkv_bias": True, "init_values": 1.0, "rope_type": "dinov3", "rope_temperature": 50.0},
        **{"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_rotate_half": True, "num_reg_tokens": 4},
        **{"use_fc_norm": False, "norm_layer": lambda width, **options: torch.nn.LayerNorm(width, 1e-5, **options)},
    )
    peer.load_state_dict(checkpoint_filter_fn(dict(meta), peer))
    with torch.no_grad():
        expected = peer.eval().forward_features((pictures(256) - MEAN) / STD)[:, 5:]
    encoder = digit_ds.load_encoder(tmp_path / "meta.pth", layer=1)
    torch.testing.assert_close(encoder(pictures(256)), expected, atol=2e-5, rtol=0)


def as_huggingface(state):
    """Meta's names of DINOv2 -> those of ``Dinov2WithRegistersModel``."""
    found = {}
    for name, value in state.items():
        for old, new in {
            "cls_token": "embeddings.cls_token",
            "mask_token": "embeddings.mask_token",
            "register_tokens": "embeddings.register_tokens",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "blocks.": "encoder.layer.",
            ".attn.proj.": ".attention.output.dense.",
            ".ls1.gamma": ".layer_scale1.lambda1",
            ".ls2.gamma": ".layer_scale2.lambda1",
        }.items():
            name = name.replace(old, new)
        name = f"layernorm{name.removeprefix('norm')}" if name.startswith("norm.") else name
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                found[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows.contiguous()
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("size", [224, 256])
def test_huggingfaces_dinov2_gives_the_features_of_metas_file_to_the_bit(size, tmp_path):
    """With the published scaling of images and positions, not with transformers'."""
    save_file(as_huggingface(torch.load(WEIGHTS, weights_only=True)), tmp_path / "model.safetensors")
    ours = digit_ds.load_encoder(tmp_path / "model.safetensors", layer=3, num_heads=2)
    bare = digit_ds.load_encoder(WEIGHTS, layer=3, num_heads=2)
    assert torch.equal(ours(pictures(size)), bare(pictures(size)))
    assert ours.provenance()["architecture"] == bare.provenance()["architecture"]


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1152, 16), (1536, 16)])
def test_head_counts_of_published_siglip(width, heads, tmp_path):
    sizes = {"num_hidden_layers": 1, "intermediate_size": 8, "patch_size": 16, "image_size": 32}
    model = SiglipVisionModel(SiglipVisionConfig(hidden_size=width, num_attention_heads=heads, **sizes))
    state = {name: value for name, value in model.state_dict().items() if ".head." not in name}
    save_file(state, tmp_path / "a.safetensors")
    assert digit_ds.load_encoder(tmp_path / "a.safetensors", layer=1).num_heads == heads


@pytest.mark.parametrize("make", [dinov3, lambda: siglip(16, 16)], ids=["dinov3", "siglip"])
def test_the_forward_pass_compiles_into_one_graph(make, tmp_path):
    encoder = digit_ds.load_encoder(saved(make(), tmp_path), layer=1, num_heads=HEADS, dtype=torch.bfloat16)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(pictures(256)), encoder(pictures(256)))


def test_a_codebook_of_another_family_is_refused(tmp_path):
    files = {name: saved(make(), tmp_path / name) for name, make in (("v3", dinov3), ("siglip", siglip))}
    encoder = digit_ds.load_encoder(files["v3"], layer=1, num_heads=HEADS)
    save_codebook(tmp_path / "km.npy", encoder(pictures(256))[0, :8].numpy(), encoder.provenance())
    tokenizer = Tokenizer(files["v3"], tmp_path / "km.npy", None, layer=None, num_heads=HEADS)
    assert tokenizer.discriminative(pictures(256))[0, :8].tolist() == list(range(8))
    del (identity := encoder.provenance())["encoder_sha256"]
    save_codebook(tmp_path / "km.npy", encoder(pictures(256))[0, :8].numpy(), identity)
    with pytest.raises(UserError, match=r"belongs to encoder architecture DINOv3 .* to encoder architecture SigLIP"):
        Tokenizer(files["siglip"], tmp_path / "km.npy", None, layer=None, num_heads=HEADS)


def refused(match, weights, **options):
    with pytest.raises(UserError, match=match) as caught:
        digit_ds.load_encoder(weights, **{"layer": 1, "num_heads": HEADS} | options)
    assert "\n" not in str(caught.value)


EXPECTED = r"expected a vision transformer in the layout of a DINOv2, DINOv3, SigLIP, MAE, MoCo v3 or iBOT checkpoint"


def test_other_families_of_huggingface_are_refused(tmp_path):
    clip = CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=72, patch_size=16, image_size=32))
    vit = ViTModel(ViTConfig(**SIZES, intermediate_size=72, patch_size=16, image_size=32))
    refused(rf"has no cls_token but \d+ tensors such as vision_model\..*, {EXPECTED}", saved(clip, tmp_path / "clip"))
    refused(rf"has no cls_token but \d+ tensors such as embeddings\..*, {EXPECTED}", saved(vit, tmp_path / "vit"))


@pytest.mark.parametrize(
    ("make", "absent", "match"),
    [
        (dinov2, "encoder.layer.1.attention.attention.value.weight", r"blocks\.1\.attn\.qkv\.weight is absent"),
        (dinov3, "layer.1.mlp.up_proj.bias", r"blocks\.1\.mlp\.fc1\.bias is absent"),
        (dinov3, "layer.1.attention.v_proj.bias", r"blocks\.1\.attn\.qkv\.bias is absent"),
        (siglip, "vision_model.encoder.layers.0.self_attn.k_proj.bias", r"blocks\.0\.attn\.qkv\.bias is absent"),
        (
            siglip,
            "vision_model.embeddings.position_embedding.weight",
            rf"has no pos_embed but \d+ tensors .*{EXPECTED}",
        ),
    ],
)
def test_a_tensor_that_is_missing_is_named(make, absent, match, tmp_path):
    state = load_file(saved(make(), tmp_path))
    del state[absent]
    save_file(state, tmp_path / "b.safetensors")
    refused(rf"b\.safetensors: .*{match}", tmp_path / "b.safetensors")


def test_damaged_safetensors(tmp_path):
    whole = saved(dinov2(), tmp_path).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (4, 12, 1000, len(whole) - 1):
        cut.write_bytes(whole[:length])
        refused(r"cut\.safetensors: is not a .* damaged or truncated one", cut)


def test_heads_that_the_rotary_positions_refuse(tmp_path):
    weights = saved(dinov3(), tmp_path)
    refused("has 2 channels in each of 16 heads, expected a multiple of 4", weights, num_heads=16)
    torch.save(as_meta(load_file(weights), torch.ones(4)), tmp_path / "meta.pth")
    refused(
        "has 32 channels in each of 1 heads, expected 16 as by its rotary periods", tmp_path / "meta.pth", num_heads=1
    )


def test_a_dinov2_file_with_its_own_table_alone_is_no_dinov3(tmp_path):
    state = random_vit(width=64, depth=1, patch=4, table=8) | {"rope_embed.periods": torch.ones(16)}
    torch.save(state, tmp_path / "a.pth")
    refused(r"tensor pos_embed is of shape \[1, 65, 64\], expected absent", tmp_path / "a.pth", num_heads=1)
