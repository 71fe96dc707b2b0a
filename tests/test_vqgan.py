"""The VQGAN: the published numbers on golden data, the data card's description on other sizes, wrong files."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizer_reference import random_vqgan, vqgan_latents, vqgan_pixels

import digit_ds
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.tokenizer.vqgan import MAGE_CONFIG, to_uint8
from digit_ds.tokenizer.vqgan_network import VqganNetwork, _norm

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT, CONFIG = GOLDEN / "vqgan" / "vqgan.ckpt", GOLDEN / "vqgan" / "config.yaml"
SMALL = {"z_channels": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}


def golden(name):
    return torch.from_numpy(np.load(GOLDEN / "vqgan" / "expected.npz")[name])


@pytest.fixture(scope="module")
def vqgan():
    return digit_ds.load_vqgan(CHECKPOINT, CONFIG)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.load(GOLDEN / "images.npz")["images_256"]).float() / 255


def save(path, content):
    torch.save(content, path)
    return path


def test_encoding_is_the_published_one(vqgan, images):
    latents = vqgan.network.encode(images)
    torch.testing.assert_close(latents, golden("z_256"), atol=5e-5, rtol=0)
    ids = vqgan.encode(images)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, golden("ids_256"))
    torch.testing.assert_close(vqgan.network.embed(ids.view(-1, 16, 16)), golden("zq_256"), atol=1e-6, rtol=0)


def test_decoding_is_the_published_one(vqgan):
    ids = golden("decode_ids")
    pixels = vqgan.decode(ids)
    torch.testing.assert_close(pixels, golden("decode_pixels"), atol=2e-5, rtol=0)
    assert torch.equal(vqgan.decode(ids.flatten(1)), pixels)
    difference = to_uint8(pixels).permute(0, 2, 3, 1).int() - golden("decode_uint8").int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_compiled_group_norms_are_torchs(dtype, tolerance):
    """Channels of one group with very different means and spreads, which a careless sum of parts gets wrong."""
    generator = torch.Generator().manual_seed(0)
    norm = _norm(64).to(torch.float64)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=generator)
    channel = torch.arange(64.0).view(64, 1, 1)
    x = torch.randn(3, 64, 6, 10, generator=generator) * (1 + channel % 5) + 7 * (channel % 3)
    rounded = norm.to(dtype)
    compiled = torch.compile(rounded)(x.to(dtype))
    assert compiled.dtype == dtype
    exact = torch.nn.functional.group_norm(
        x.to(dtype).double(), 32, rounded.weight.double(), rounded.bias.double(), 1e-6
    )
    torch.testing.assert_close(compiled.double(), exact, rtol=tolerance, atol=tolerance)


def test_pixels_are_clipped_and_truncated():
    values = torch.tensor([-0.5, 0.0, 0.0039, 0.5, 0.9999, 1.0, 1.7])
    assert to_uint8(values).tolist() == [0, 0, 0, 127, 254, 255, 255]
    assert to_uint8(values).dtype == torch.uint8


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({}, (16, 16)),
        ({"ch_mult": [1], "num_res_blocks": 2}, (4, 6)),
        ({"ch_mult": [2, 1, 3], "num_res_blocks": 3, "z_channels": 5}, (16, 8)),
        ({"ch": 64, "in_channels": 1, "out_ch": 1}, (8, 8)),
    ],
)
def test_any_size_follows_the_description(tmp_path, changes, side):
    ddconfig = {**SMALL, **changes}
    state = random_vqgan(ddconfig, codes=20)
    vqgan = digit_ds.load_vqgan(save(tmp_path / "v.ckpt", state), {"n_embed": 20, "ddconfig": ddconfig})
    factor = 2 ** (len(ddconfig["ch_mult"]) - 1)
    assert (vqgan.codes, vqgan.downsampling) == (20, factor)
    images = torch.rand(2, ddconfig["in_channels"], *side, generator=torch.Generator().manual_seed(1))
    latents = vqgan_latents(state, ddconfig, images)
    torch.testing.assert_close(vqgan.network.encode(images), latents, atol=5e-5, rtol=0)
    book = state["quantize.embedding.weight"]
    nearest = (latents.permute(0, 2, 3, 1)[..., None, :] - book).square().sum(-1).argmin(-1)
    assert torch.equal(vqgan.encode(images), nearest.flatten(1))
    pixels = vqgan_pixels(state, ddconfig, nearest)
    torch.testing.assert_close(vqgan.decode(nearest), pixels, atol=5e-5, rtol=0)
    assert pixels.shape == (2, ddconfig["out_ch"], *side)


def test_checkpoint_wrappers_and_configuration_forms_are_equal(tmp_path):
    state = random_vqgan(SMALL, codes=20)
    training = {"loss.discriminator.main.0.weight": torch.ones(2), "loss.logvar": torch.ones(1)}
    flat = save(tmp_path / "flat.ckpt", state)
    wrapped = save(tmp_path / "wrapped.ckpt", {"state_dict": {**state, **training}, "global_step": 7})
    bare = {"embed_dim": 8, "n_embed": 20, "ddconfig": {**SMALL, "attn_resolutions": [16], "dropout": 0.0}}
    whole = {"model": {"target": "taming.models.vqgan.VQModel", "params": bare}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    ids = torch.arange(16).view(1, 4, 4)
    expected = vqgan_pixels(state, SMALL, ids)
    for checkpoint in (flat, wrapped):
        for config in (bare, whole, {"params": bare}, tmp_path / "config.yaml", str(tmp_path / "config.yaml")):
            pixels = digit_ds.load_vqgan(checkpoint, config).decode(ids)
            torch.testing.assert_close(pixels, expected, atol=5e-5, rtol=0)


def test_the_default_configuration_is_that_of_mage(tmp_path):
    with torch.device("meta"):
        network = VqganNetwork(MAGE_CONFIG["ddconfig"], MAGE_CONFIG["n_embed"])
    assert network.downsampling == 16
    assert network.quantize["embedding"].weight.shape == (1024, 256)
    assert network.encoder.down[4]["block"][0].conv1.weight.shape == (512, 256, 3, 3)
    assert network.decoder.up[0]["block"][1].conv2.weight.shape == (128, 128, 3, 3)
    state = {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in network.state_dict().items()}
    vqgan = digit_ds.load_vqgan(save(tmp_path / "mage.ckpt", {"state_dict": state}), dtype=torch.bfloat16)
    assert vqgan.encode(torch.rand(1, 3, 32, 32)).tolist() == [[0] * 4]  # all codes are equal: the lowest wins


def test_bfloat16_networks_give_float_pixels(images):
    coarse = digit_ds.load_vqgan(CHECKPOINT, CONFIG, dtype=torch.bfloat16)
    pixels = coarse.decode(golden("decode_ids"))
    assert pixels.dtype == torch.float32
    assert (pixels - golden("decode_pixels")).abs().mean() < 0.02
    assert (
        coarse.encode(images[:1, :, :64, :64])
        == digit_ds.load_vqgan(CHECKPOINT, CONFIG).encode(images[:1, :, :64, :64])
    ).float().mean() > 0.5


@pytest.mark.parametrize(("dtype", "most", "mean"), [(torch.float16, 1, 0.15), (torch.bfloat16, 8, 0.8)])
def test_half_precision_pictures_are_close(vqgan, dtype, most, mean):
    """Pixel levels of 255; measured: 1 and 0.07 in float16, 6 and 0.49 in bfloat16."""
    ids = golden("decode_ids")
    coarse = digit_ds.load_vqgan(CHECKPOINT, CONFIG, dtype=dtype)
    difference = (to_uint8(coarse.decode(ids)).int() - to_uint8(vqgan.decode(ids)).int()).abs()
    assert 0 < difference.max() <= most
    assert difference.float().mean() < mean


def test_loaded_networks_are_frozen_and_new_ones_train():
    frozen = digit_ds.load_vqgan(CHECKPOINT, CONFIG)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    torch.manual_seed(0)
    network = VqganNetwork(SMALL, codes=16)
    images = torch.rand(4, 3, 8, 8)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        latents = network.encode(images)
        quantised = network.embed(network.quantise(latents))
        straight_through = latents + (quantised - latents).detach()
        pixels = network.decode(straight_through)
        loss = (pixels - images).square().mean() + (quantised - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_trained_network_is_saved_in_the_published_layout(tmp_path):
    network = VqganNetwork(SMALL, codes=20)
    assert network.state_dict().keys() == random_vqgan(SMALL, codes=20).keys()
    path = save(tmp_path / "v.ckpt", {"state_dict": network.state_dict()})
    vqgan = digit_ds.load_vqgan(path, {"n_embed": 20, "ddconfig": SMALL})
    assert vqgan.provenance() == {"vqgan_sha256": sha256(path)}
    ids = torch.arange(16).view(1, 4, 4)
    torch.testing.assert_close(vqgan.decode(ids), network.decode(network.embed(ids)).detach())


def refused(match, checkpoint=CHECKPOINT, config=CONFIG):
    with pytest.raises(UserError, match=match) as caught:
        digit_ds.load_vqgan(checkpoint, config)
    assert "\n" not in str(caught.value)


def test_configuration_and_checkpoint_that_disagree(tmp_path):
    refused(
        r"vqgan\.ckpt, read with MAGE's configuration: tensor encoder\.conv_in\.weight is of shape \[32, 3, 3, 3\], "
        r"expected of shape \[128, 3, 3, 3\] \(and \d+ more tensors differ\); "
        r"a VQGAN other than MAGE's needs its configuration \(--vqgan-config\)",
        config=None,
    )
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["params"]["n_embed"] = 41
    refused(
        r"read with the given VQGAN configuration: tensor quantize\.embedding\.weight is of shape \[40, 16\], expected "
        r"of shape \[41, 16\]$",
        config=config,
    )
    state = random_vqgan(SMALL, codes=20)
    small = {"n_embed": 20, "ddconfig": SMALL}
    refused(
        r"tensor quant_conv\.weight is of shape \[8, 8, 1, 1\], expected absent$",
        save(tmp_path / "taming.ckpt", {**state, "quant_conv.weight": torch.ones(8, 8, 1, 1)}),
        small,
    )
    del state["decoder.conv_out.bias"]
    refused(
        r"tensor decoder\.conv_out\.bias is absent, expected of shape \[3\]$", save(tmp_path / "cut.ckpt", state), small
    )


@pytest.mark.parametrize("content", [{}, {"state_dict": None}, {"model": {"a": torch.ones(1)}}, [1], torch.ones(3)])
def test_other_checkpoints(tmp_path, content):
    refused(r"v\.ckpt, read with .*: tensor encoder\.conv_in\.weight is absent", save(tmp_path / "v.ckpt", content))


def test_other_files(tmp_path):
    refused(
        r"dinov2_reg4_tiny\.pth, read with .*config\.yaml: tensor encoder\.conv_in\.weight is absent",
        GOLDEN / "dinov2" / "dinov2_reg4_tiny.pth",
    )
    (tmp_path / "cut.ckpt").write_bytes(CHECKPOINT.read_bytes()[:-1000])
    refused(r"cut\.ckpt: is not a PyTorch checkpoint, or a damaged or truncated one$", tmp_path / "cut.ckpt")
    refused(r"missing\.ckpt: cannot be read", tmp_path / "missing.ckpt")
    refused(r"missing\.yaml: cannot be read", config=tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    refused(r"bad\.yaml: is not valid YAML", config=tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    refused(r"list\.yaml: has no section ddconfig", config=tmp_path / "list.yaml")
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.system ['true']")
    refused(r"code\.yaml: is not valid YAML", config=tmp_path / "code.yaml")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ch": "128"}, "ch is '128', expected a positive whole number"),
        ({"ch": 48}, "ch is 48, expected a multiple of the 32 normalisation groups"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0, expected a positive"),
        ({"ch_mult": 3}, "ch_mult is 3, expected a list of positive whole numbers"),
        ({"ch_mult": [1, 0.5]}, r"ch_mult is \[1, 0.5\]"),
        ({"ch_mult": []}, r"ch_mult is \[\]"),
        ({"z_channels": None}, "z_channels is None|embed_dim is None"),
        ({"z_channels": 4}, "embed_dim is 8, expected 4, its z_channels"),
        ({"in_channels": True}, "in_channels is True, expected"),
    ],
)
def test_wrong_configurations(changes, match):
    config = {"embed_dim": 8, "n_embed": 20, "ddconfig": {**SMALL, **changes}}
    refused(f"the given VQGAN configuration: {match}", config=config)


def test_images_and_ids_that_do_not_fit(vqgan):
    with pytest.raises(UserError, match="images are 250x256, expected multiples of 16"):
        vqgan.encode(torch.zeros(1, 3, 250, 256))
    with pytest.raises(UserError, match=r"images are torch\.uint8, expected floating point in \[0, 1\]"):
        vqgan.encode(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    with pytest.raises(
        UserError, match=r"12 VQ tokens do not form a square grid, expected them as \[B, rows, columns\]"
    ):
        vqgan.decode(torch.zeros(1, 12, dtype=torch.int64))
