"""The encoder's numbers: the published code's on golden data, the data card's description on other sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_reference import as_ibot, as_ibot_run, as_mae, as_moco, random_vit, vit_features

import digit_ds
from digit_ds.files import sha256
from digit_ds.tokenizer.encoder import interpolate_positions

GOLDEN = Path(__file__).parent / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())["dinov2"]
WEIGHTS = GOLDEN / "dinov2" / "dinov2_reg4_tiny.pth"


def golden_images(size):
    return torch.from_numpy(np.load(GOLDEN / "images.npz")[f"images_{size}"]).float() / 255


def golden(name):
    return torch.from_numpy(np.load(GOLDEN / "dinov2" / "expected.npz")[name])


def golden_encoder(**options):
    return digit_ds.load_encoder(WEIGHTS, layer=META["n_last_blocks"], num_heads=META["num_heads"], **options)


def save(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("size", [224, 256])
def test_features_are_the_published_ones(size):
    features = golden_encoder()(golden_images(size))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, golden(f"features_{size}"), atol=1e-5, rtol=0)


def test_image_and_position_interpolation_are_the_published_ones():
    encoder = golden_encoder()
    crop = encoder.preprocess(golden_images(256))[:, :, 96:128, 96:128]
    torch.testing.assert_close(crop, golden("normalized_resized_crop_256"), atol=1e-6, rtol=0)
    table = torch.load(WEIGHTS, weights_only=True)["pos_embed"]
    torch.testing.assert_close(
        interpolate_positions(table[:, 1:], 16), golden("interpolated_pos_embed")[:, 1:], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("sizes", "heads", "layer", "image", "shrink"),
    [
        ({"width": 32, "depth": 5}, 4, 3, 256, True),
        ({"width": 48, "depth": 2, "registers": 0}, 3, 1, 224, False),
        ({"width": 40, "depth": 3, "registers": 1, "hidden": 100, "scaled": False}, 5, 2, 224, False),
        ({"width": 24, "depth": 2, "gated": True, "hidden": 56}, 2, 2, 224, False),
        ({"width": 32, "depth": 4, "patch": 4, "table": 8}, 2, 4, 32, False),
        ({"width": 32, "depth": 2, "patch": 16, "table": 14}, 2, 1, 256, True),
        ({"width": 32, "depth": 2, "patch": 16, "table": 37}, 2, 1, 224, False),
        ({"width": 32, "depth": 2, "patch": 7, "table": 8}, 2, 1, 64, True),
    ],
)
def test_any_size_follows_the_description(tmp_path, sizes, heads, layer, image, shrink):
    state = random_vit(**sizes)
    encoder = digit_ds.load_encoder(save(tmp_path / "vit.pth", state), layer=layer, num_heads=heads)
    images = torch.rand(2, 3, image, image, generator=torch.Generator().manual_seed(1))
    features = encoder(images)
    expected = vit_features(state, images.double(), layer=layer, heads=heads, shrink=shrink)
    assert (encoder.width, encoder.depth, encoder.layer) == (sizes["width"], sizes["depth"], layer)
    rows, columns = encoder.grid(image)
    assert features.shape == (2, rows * columns, sizes["width"])
    torch.testing.assert_close(features.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("layout", "name"), [(as_mae, "MAE"), (as_moco, "MoCo v3"), (as_ibot, "iBOT"), (as_ibot_run, "iBOT")]
)
@pytest.mark.parametrize("image", [224, 256])
def test_other_published_layouts(tmp_path, layout, name, image):
    state = random_vit(width=32, depth=3, patch=16, table=14, registers=0, scaled=False)
    encoder = digit_ds.load_encoder(save(tmp_path / "vit.pth", layout(state)), layer=2, num_heads=4)
    assert encoder.provenance()["architecture"].startswith(f"{name} width 32 depth 3 heads 4 patch 16")
    assert encoder.image_sizes == (224, 256)
    images = torch.rand(1, 3, image, image, generator=torch.Generator().manual_seed(1))
    expected = vit_features(state, images.double(), layer=2, heads=4)
    assert expected.shape[1] == (image // 16) ** 2
    torch.testing.assert_close(encoder(images).double(), expected, atol=5e-5, rtol=0)


def test_misnamed_layers_of_moco_are_found(tmp_path):
    state = random_vit(width=8, depth=15, patch=16, table=14, registers=0, scaled=False)
    misnamed = {}
    for name, value in state.items():
        name = name.replace("blocks.13.norm1.", "blocks.13.norm13.").replace(
            "blocks.13.mlp.fc1.", "blocks.13.mlp.fc13."
        )
        name = name.replace("blocks.14.norm2.", "blocks.14.norm14.").replace(
            "blocks.14.mlp.fc2.", "blocks.14.mlp.fc14."
        )
        misnamed[name] = value
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    encoder = digit_ds.load_encoder(save(tmp_path / "vit.pth", as_moco(misnamed)), layer=1, num_heads=2)
    expected = vit_features(state, images.double(), layer=1, heads=2)
    torch.testing.assert_close(encoder(images).double(), expected, atol=5e-5, rtol=0)


def test_head_count_defaults_to_a_sixty_fourth_of_the_width(tmp_path):
    weights = save(tmp_path / "vit.pth", random_vit(width=192, depth=1, patch=4, table=4))
    assert digit_ds.load_encoder(weights, layer=1).num_heads == 3


def test_half_precision_checkpoints_and_networks(tmp_path):
    state = random_vit(width=64, depth=3, patch=4, table=8)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    halves = save(tmp_path / "half.pth", {name: value.half() for name, value in state.items()})
    expected = vit_features({name: value.half() for name, value in state.items()}, images.double(), layer=1, heads=2)
    features = digit_ds.load_encoder(halves, layer=1, num_heads=2)(images)
    torch.testing.assert_close(features.double(), expected, atol=5e-5, rtol=0)
    coarse = digit_ds.load_encoder(halves, layer=1, num_heads=2, dtype=torch.bfloat16)(images)
    assert coarse.dtype == torch.bfloat16
    assert (coarse.double() - expected).abs().mean() < 0.03


def test_later_blocks_are_not_kept_and_nothing_can_be_trained():
    encoder = golden_encoder()
    assert len(encoder.vit.blocks) == META["depth"] - META["n_last_blocks"] + 1
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_later_blocks_may_hold_anything(tmp_path):
    state = torch.load(WEIGHTS, weights_only=True)
    poisoned = {
        name: torch.full_like(value, torch.nan) if name.startswith(("blocks.3.", "blocks.4.")) else value
        for name, value in state.items()
    }
    encoder = digit_ds.load_encoder(save(tmp_path / "vit.pth", poisoned), layer=3, num_heads=META["num_heads"])
    torch.testing.assert_close(encoder(golden_images(224)), golden("features_224"), atol=1e-5, rtol=0)


def test_a_loaded_encoder_does_not_depend_on_its_file(tmp_path):
    copy = tmp_path / "vit.pth"
    copy.write_bytes(WEIGHTS.read_bytes())
    encoder = digit_ds.load_encoder(copy, layer=3, num_heads=META["num_heads"])
    with copy.open("r+b") as stream:
        stream.truncate(0)
    torch.testing.assert_close(encoder(golden_images(224)), golden("features_224"), atol=1e-5, rtol=0)


def test_provenance_tells_encoders_apart():
    encoder = golden_encoder()
    provenance = encoder.provenance()
    assert provenance == json.loads(json.dumps(provenance))
    assert provenance["encoder_sha256"] == sha256(WEIGHTS)
    assert provenance["layer"] == 3
    other = digit_ds.load_encoder(WEIGHTS, layer=2, num_heads=1).provenance()
    assert other["layer"] != provenance["layer"]
    assert other["architecture"] != provenance["architecture"]
    assert other["encoder_sha256"] == provenance["encoder_sha256"]


def test_the_forward_pass_compiles_into_one_graph():
    encoder = golden_encoder(dtype=torch.bfloat16)
    images = golden_images(256)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), encoder(images))


def test_timm_reads_the_same_network_from_the_same_file(tmp_path):
    """timm's own DINOv2 converter as a second witness of the names and their meaning, where no table is scaled."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    state = random_vit(width=32, depth=3, patch=4, table=8)
    peer = VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=0,
        init_values=1.0,
        reg_tokens=4,
        no_embed_class=True,
    )
    peer.load_state_dict(checkpoint_filter_fn(dict(state), peer))
    encoder = digit_ds.load_encoder(save(tmp_path / "vit.pth", state), layer=1, num_heads=2)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = peer.eval().forward_features(encoder.preprocess(images))[:, 5:]
    torch.testing.assert_close(encoder(images), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"teacher": {**{f"backbone.{name}": value for name, value in state.items()}, **HEADS}},
        lambda state: {"student": {**{f"backbone.{name}": value for name, value in state.items()}, **HEADS}},
        lambda state: {"teacher": {f"backbone.{chunked(name)}": value for name, value in state.items()}},
    ],
    ids=["model", "teacher", "student", "chunks"],
)
def test_dinov2_is_known_in_the_wrappers_that_people_have(wrap, tmp_path):
    """Sizes, the scaling of 256 to 224 and the features are those of the bare file."""
    wrapped = save(tmp_path / "wrapped.pth", wrap(torch.load(WEIGHTS, weights_only=True)))
    options = {"layer": META["n_last_blocks"], "num_heads": META["num_heads"]}
    encoder = digit_ds.load_encoder(wrapped, **options)
    assert encoder.image_sizes == golden_encoder().image_sizes == (224, 256)
    assert encoder.provenance()["transform"] == golden_encoder().provenance()["transform"]
    torch.testing.assert_close(encoder(golden_images(256)), golden("features_256"), atol=1e-5, rtol=0)


HEADS = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight": torch.zeros(2, 2)}


def chunked(name: str) -> str:
    """A block's name in a training file, where blocks come in chunks."""
    return f"blocks.{int(name.split('.')[1]) // 2}{name.removeprefix('blocks')}" if name.startswith("blocks.") else name
