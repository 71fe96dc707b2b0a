"""The tokenizer on a GPU: float32 without TF32 gives the published tokens, bfloat16 nearly all of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_reference import random_vit

import digit_ds
from digit_ds.tokenizer.codebook import nearest
from digit_ds.tokenizer.vqgan import to_uint8

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GOLDEN = Path(__file__).parents[1] / "golden"
DINO, CENTROIDS = GOLDEN / "dinov2" / "dinov2_reg4_tiny.pth", GOLDEN / "kmeans" / "centroids.npy"
CHECKPOINT, CONFIG = GOLDEN / "vqgan" / "vqgan.ckpt", GOLDEN / "vqgan" / "config.yaml"


def golden(name, array):
    return torch.from_numpy(np.load(GOLDEN / name)[array]).cuda()


def golden_images(size):
    return golden("images.npz", f"images_{size}").float() / 255


def golden_encoder():
    heads = json.loads((GOLDEN / "meta.json").read_text())["dinov2"]["num_heads"]
    return digit_ds.load_encoder(DINO, num_heads=heads, device="cuda")


@pytest.fixture(params=["as installed", "allow_tf32", "high", "fp32_precision"])
def tf32_settings(request):
    """Every way in which a caller may have let TF32 in; float32 tokens must not notice."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision, torch.get_float32_matmul_precision()
    if request.param == "allow_tf32":
        matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif request.param == "high":
        torch.set_float32_matmul_precision("high")
    elif request.param == "fp32_precision":
        matmul.fp32_precision = convolution.fp32_precision = "tf32"
    during = matmul.fp32_precision, convolution.fp32_precision
    yield request.param
    assert (matmul.fp32_precision, convolution.fp32_precision) == during, "the caller's settings were not restored"
    torch.set_float32_matmul_precision(before[2])
    matmul.fp32_precision, convolution.fp32_precision = before[:2]


@pytest.mark.parametrize("size", [224, 256])
def test_float32_features_and_tokens_are_the_published_ones(size, tf32_settings):
    features = golden_encoder()(golden_images(size))
    torch.testing.assert_close(features, golden("dinov2/expected.npz", f"features_{size}"), atol=1e-4, rtol=0)
    codes = digit_ds.load_codebook(CENTROIDS, "cuda").assign(features)
    assert torch.equal(codes, golden("kmeans/expected.npz", f"ids_{size}"))


def test_float32_vqgan_is_the_published_one(tf32_settings):
    vqgan = digit_ds.load_vqgan(CHECKPOINT, CONFIG, device="cuda")
    assert torch.equal(vqgan.encode(golden_images(256)), golden("vqgan/expected.npz", "ids_256"))
    pixels = vqgan.decode(golden("vqgan/expected.npz", "decode_ids"))
    torch.testing.assert_close(pixels, golden("vqgan/expected.npz", "decode_pixels"), atol=1e-4, rtol=0)


def test_bfloat16_vqgan():
    vqgan = digit_ds.load_vqgan(CHECKPOINT, CONFIG, device="cuda", dtype=torch.bfloat16)
    agreement = (vqgan.encode(golden_images(256)) == golden("vqgan/expected.npz", "ids_256")).float().mean()
    error = (
        vqgan.decode(golden("vqgan/expected.npz", "decode_ids")) - golden("vqgan/expected.npz", "decode_pixels")
    ).abs()
    print(f"bfloat16 VQGAN: {agreement:.4f} of the ids agree, pixels off by {error.mean():.5f} on average")
    assert agreement > 0.8
    assert error.mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compiled_vqgan_gives_nearly_the_same_tokens(dtype):
    """As many of the published tokens as uncompiled, but for those that lie between two codes."""
    agreement = {}
    for compiled in (False, True):
        vqgan = digit_ds.load_vqgan(CHECKPOINT, CONFIG, device="cuda", dtype=dtype)
        if compiled:
            vqgan.network.encoder.compile()
        found = vqgan.encode(golden_images(256)) == golden("vqgan/expected.npz", "ids_256")
        agreement[compiled] = float(found.float().mean())
    print(f"{dtype}: {agreement[False]:.4f} of the ids agree, compiled {agreement[True]:.4f}")
    assert agreement[True] > agreement[False] - 0.01


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [(torch.float32, 1, 0.01), (torch.float16, 1, 0.15), (torch.bfloat16, 8, 0.8)]
)
def test_pictures_in_half_precision_and_compiled_are_close(dtype, most, mean, compiled, record_property):
    """Pixel levels of 255; on a CPU 1 and 0.07 in float16, 6 and 0.49 in bfloat16."""
    ids = golden("vqgan/expected.npz", "decode_ids")
    exact = to_uint8(golden("vqgan/expected.npz", "decode_pixels")).int()
    vqgan = digit_ds.load_vqgan(CHECKPOINT, CONFIG, device="cuda", dtype=dtype)
    if compiled:
        vqgan.compile_decoder()
    difference = (to_uint8(vqgan.decode(ids)).int() - exact).abs()
    largest, average = int(difference.max()), float(difference.float().mean())
    record_property("largest", largest)
    record_property("mean", average)
    print(f"{dtype}, compiled {compiled}: pixels off by {largest} levels at most, {average:.4f} on average")
    assert largest <= most
    assert average < mean


@pytest.fixture(scope="module")
def base_weights(tmp_path_factory):
    """DINOv2 ViT-B/14 with registers, random."""
    path = tmp_path_factory.mktemp("weights") / "dinov2_vitb14_reg4_random.pth"
    torch.save(random_vit(width=768, depth=12, patch=14, table=37), path)
    return path


def smooth_images(count, size=224, seed=0):
    coarse = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1).cuda()


def test_bfloat16_encoder_gives_nearly_the_same_tokens(base_weights):
    exact = digit_ds.load_encoder(base_weights, device="cuda")
    coarse = digit_ds.load_encoder(base_weights, device="cuda", dtype=torch.bfloat16)
    centroids = exact(smooth_images(32, seed=1)).flatten(0, 1)[::4]  # [2048, 768]
    images = smooth_images(64)
    features, rough = exact(images), coarse(images)
    assert rough.dtype == torch.bfloat16
    agreement = (nearest(features, centroids) == nearest(rough, centroids)).float().mean()
    error = (features - rough.float()).abs()
    print(f"bfloat16 ViT-B/14: {agreement:.4f} of the tokens agree, features off by {error.mean():.5f} on average")
    assert agreement > 0.9
    assert error.mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_assignment_is_that_of_float64_but_for_equal_distances(dtype, tf32_settings):
    generator = torch.Generator("cuda").manual_seed(0)
    centroids = torch.randn(8192, 768, device="cuda", generator=generator)
    picked = torch.randint(8192, (20_000,), device="cuda", generator=generator)
    features = (centroids[picked] + torch.randn(20_000, 768, device="cuda", generator=generator)).to(dtype)
    codes = nearest(features, centroids)
    wide = features.double()
    distances = (
        wide.square().sum(1, keepdim=True) - 2 * wide @ centroids.double().T + centroids.double().square().sum(1)
    )
    best, best_codes = distances.min(1)
    chosen = distances.gather(1, codes[:, None])[:, 0]
    print(f"{dtype}: {(codes != best_codes).sum()} of {len(codes)} differ, by at most {(chosen - best).max():.2e}")
    assert (codes != best_codes).float().mean() < 1e-3
    # |f|^2 and 2 f.c are about 1,500 here: float32 rounds them to about 1e-4.
    assert (chosen - best).max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_centroids_give_the_lowest_index(dtype):
    centroids = torch.randn(64, 32, device="cuda").repeat(3, 1)
    codes = nearest(torch.randn(500, 32, device="cuda", dtype=dtype), centroids)
    assert codes.max() < 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_waits_for_the_gpu(base_weights, tmp_path, dtype):
    encoder = digit_ds.load_encoder(base_weights, device="cuda", dtype=dtype)
    centroids = torch.randn(512, 768, device="cuda")
    images = smooth_images(2, size=256)
    nearest(encoder(images), centroids)  # first use sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        nearest(encoder(images), centroids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_assignment_memory_is_bounded(dtype):
    features = torch.randn(262_144, 64, device="cuda", dtype=dtype)
    centroids = torch.randn(16_384, 64, device="cuda")  # all distances at once: 16 GiB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest(features, centroids)
    assert torch.cuda.max_memory_allocated() - before < 2 << 30


def test_the_encoder_can_be_compiled(base_weights):
    encoder = digit_ds.load_encoder(base_weights, device="cuda", dtype=torch.bfloat16)
    images = smooth_images(4)
    compiled = torch.compile(encoder, fullgraph=True)(images)
    assert (compiled.float() - encoder(images).float()).abs().mean() < 0.02
