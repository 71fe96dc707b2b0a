"""Wrong weights, layers, heads and images: one line with what was found and what was expected."""

from pathlib import Path

import pytest
import torch
from tokenizer_reference import as_moco, random_vit

import digit_ds
from digit_ds.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = GOLDEN / "dinov2" / "dinov2_reg4_tiny.pth"


def refused(match, weights=WEIGHTS, **options):
    with pytest.raises(UserError, match=match) as caught:
        digit_ds.load_encoder(weights, **options)
    assert "\n" not in str(caught.value)


def save(path, content):
    torch.save(content, path)
    return path


def small(**changes):
    state = random_vit(width=64, depth=2, patch=4, table=8)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize("layer", [0, 6, -1])
def test_layers_that_do_not_exist(layer):
    refused(rf"layer is {layer}, expected 1 \(the last block\) to 5 .*dinov2_reg4_tiny\.pth", layer=layer, num_heads=2)


@pytest.mark.parametrize("heads", [0, 3, -2, 32])
def test_head_counts_that_do_not_divide_the_width(heads):
    refused(f"num_heads is {heads}, expected a divisor of the width 16", num_heads=heads)


def test_a_width_without_a_default_head_count():
    refused(r"width 16 is not a multiple of 64, expected the head count as num_heads \(--num-heads\)")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"encoder.conv_in.weight": torch.ones(2)}},
        {"model": {"decoder.embed_tokens.weight": torch.ones(2)}, "cfg": {}},
        {"weight": torch.ones(2)},
        [torch.ones(2)],
        torch.ones(2),
        {},
        {"model": None},
    ],
)
def test_another_models_checkpoint(tmp_path, content):
    refused(
        r"a\.pth: has no cls_token but (no tensors|1 tensors such as [a-z_.]+), expected a vision transformer in the "
        "layout of a DINOv2, DINOv3, SigLIP, MAE, MoCo v3 or iBOT checkpoint",
        save(tmp_path / "a.pth", content),
    )


def test_golden_files_of_other_kinds():
    refused(r"vqgan\.ckpt: has no cls_token", GOLDEN / "vqgan" / "vqgan.ckpt")
    refused(r"centroids\.npy: is not a PyTorch checkpoint", GOLDEN / "kmeans" / "centroids.npy")
    refused(r"missing\.pth: cannot be read", GOLDEN / "missing.pth")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"blocks__1__attn__qkv__bias": None},
            r"tensor blocks\.1\.attn\.qkv\.bias is absent, expected of shape \[192\]",
        ),
        ({"blocks__1__attn__q_norm__weight": torch.ones(64)}, r"tensor blocks\.1\.attn\.q_norm\.weight is of shape"),
        ({"blocks__0__ls1__gamma": torch.ones(1)}, r"tensor blocks\.0\.ls1\.gamma is of shape \[1\], expected absent"),
        ({"norm__weight": torch.ones(32)}, r"tensor norm\.weight is of shape \[32\], expected of shape \[64\]"),
        ({"patch_embed__proj__weight": torch.ones(64, 1, 4, 4)}, r"shape \[64, 1, 4, 4\], expected \[64, 3, 4, 4\]"),
        ({"patch_embed__proj__weight": torch.ones(64)}, r"patch_embed\.proj\.weight has shape \[64\]"),
        ({"pos_embed": torch.ones(1, 64, 64)}, r"pos_embed has shape \[1, 64, 64\], expected \[1, 50, 64\]"),
        ({"pos_embed": torch.ones(64)}, r"pos_embed has shape \[64\]"),
        ({"cls_token": torch.ones(1, 1, 32)}, r"cls_token has shape \[1, 1, 32\], expected \[1, 1, 64\]"),
        ({"register_tokens": torch.ones(1, 4, 32)}, r"register_tokens has shape \[1, 4, 32\], expected \[1, 4, 64\]"),
        ({"register_tokens": torch.ones(64)}, r"register_tokens has shape \[64\]"),
        ({"blocks__0__mlp__fc1__weight": None}, r"has no blocks\.0\.mlp\.fc1\.weight"),
    ],
)
def test_damaged_vision_transformers(tmp_path, changes, match):
    refused(match, save(tmp_path / "a.pth", small(**changes)), layer=1)


def test_a_damaged_copy_inside_another_layout(tmp_path):
    state = small(blocks__1__norm1__weight=None)
    refused(r"a\.pth: tensor blocks\.1\.norm1\.weight is absent", save(tmp_path / "a.pth", as_moco(state)), layer=1)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (224, 256), (518, 518), (0, 0)])
def test_images_of_other_sizes(height, width):
    encoder = digit_ds.load_encoder(WEIGHTS, num_heads=2)
    with pytest.raises(UserError, match=f"images are {height}x{width}, expected 224x224 or 256x256"):
        encoder(torch.zeros(1, 3, height, width))
    if height == width:
        with pytest.raises(UserError, match=f"image_size is {height} pixels, expected 224 or 256"):
            encoder.grid(height)


def test_images_in_bytes():
    with pytest.raises(UserError, match=r"images are torch\.uint8, expected floating point in \[0, 1\]"):
        digit_ds.load_encoder(WEIGHTS, num_heads=2)(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))


def test_small_encoders_take_their_own_size_only(tmp_path):
    encoder = digit_ds.load_encoder(save(tmp_path / "a.pth", small()), layer=1)
    assert encoder.image_sizes == (32,)
    assert encoder.grid(32) == (8, 8)
    with pytest.raises(UserError, match="images are 224x224, expected 32x32"):
        encoder(torch.zeros(1, 3, 224, 224))
