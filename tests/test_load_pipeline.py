"""``digit_ds.load_pipeline`` draws what the command draws, byte for byte."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calls import sample
from PIL import Image
from preparation_parts import make_images
from small_models import write_models, write_own

import digit_ds
from digit_ds.data.images import walk
from digit_ds.errors import UserError


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    models = write_models(tmp_path_factory.mktemp("models"))
    return {"vqgan": models.pop("vqgan.ckpt"), "vqgan_config": models.pop("vqgan.yaml"), **models}


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict[str, Path]:
    """Models with a real tokeniser: 32-pixel pictures of 8 x 8 tokens."""
    parts = write_own(tmp_path_factory.mktemp("own"))
    return {"decoder": parts.pop("ar"), "num_heads": 2, **parts}


def files(out: Path) -> list[bytes]:
    """The pixels of the pictures that a job wrote."""
    return [np.asarray(Image.open(path)).tobytes() for path in sorted((out / "images").iterdir())]


def assert_equal(pictures, out: Path) -> None:
    """Pictures, tokens and labels are those of the job."""
    assert [np.asarray(picture).tobytes() for picture in pictures.pil()] == files(out)
    with np.load(out / "tokens.npz") as tokens:
        assert tokens["label"].tolist() == pictures.labels
        assert np.array_equal(tokens["vq"], pictures.vq)
        assert ("discriminative" in tokens) == (pictures.discriminative is not None)
        if pictures.discriminative is not None:
            assert np.array_equal(tokens["discriminative"], pictures.discriminative)
    assert np.array_equal(np.asarray(Image.open(out / "grid.png")), np.asarray(pictures.grid()))


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_samples_are_those_of_the_command(parts, tmp_path, precision):
    common = {name: parts[name] for name in ("vqgan", "vqgan_config", "prior")} | {"precision": precision, "batch": 32}
    drawing = {"classes": ["cat", "bee"], "count": 37, "seed": 5, "guidance": 2.0, "top_k": 9, "decoder_top_p": 0.8}
    sample(tmp_path / "out", pixel_decoder=parts["ar"], **common, **drawing)
    pipeline = digit_ds.load_pipeline(decoder=parts["ar"], device="cpu", **common)
    pipeline.sample(count=3)  # what was drawn before changes nothing
    assert pipeline.class_names == ["ant", "bee", "cat"]
    assert_equal(pipeline.sample(**drawing), tmp_path / "out")


def test_a_vq_baseline_needs_no_decoder(parts, tmp_path):
    common = {name: parts[name] for name in ("vqgan", "vqgan_config")} | {"prior": parts["vq"]}
    sample(tmp_path / "out", **common, count=5, seed=2)
    pipeline = digit_ds.load_pipeline(**common, device="cpu")
    drawn = pipeline.sample(count=5, seed=2)
    assert_equal(drawn, tmp_path / "out")
    sample(tmp_path / "half", **common, from_images=tmp_path / "out/images", keep=12)
    assert_equal(pipeline.complete(drawn.images, keep=12), tmp_path / "half")


def test_given_pictures_are_those_of_the_command(own, tmp_path):
    """From a folder, files, PIL images and tensors alike."""
    images = make_images(tmp_path / "images", 5)
    paths = [images / name for name in walk(images)]
    command = {**own, "from_images": images}
    command["pixel_decoder"] = command.pop("decoder")
    pipeline = digit_ds.load_pipeline(**own, device="cpu")
    sample(tmp_path / "all", **{**command, "prior": None}, seed=4)
    assert_equal(pipeline.reconstruct(images, seed=4), tmp_path / "all")
    sample(tmp_path / "half", **command, keep=32, classes=["bee"], guidance=1.5)
    half = pipeline.complete(paths, keep=32, classes=["bee"], guidance=1.5)
    opened = pipeline.complete([Image.open(path) for path in paths], keep=32, classes=["bee"] * 5, guidance=1.5)
    for found in (half, opened):
        assert_equal(found, tmp_path / "half")
    tensor = torch.from_numpy(
        np.stack([np.asarray(Image.open(path).convert("RGB").resize((32, 32))) for path in paths])
    )
    assert torch.equal(
        pipeline.reconstruct(tensor.permute(0, 3, 1, 2)).vq,
        pipeline.reconstruct(list(map(Image.fromarray, tensor.numpy()))).vq,
    )


@pytest.mark.parametrize(
    ("method", "given", "options", "message"),
    [
        ("sample", (), {"classes": ["bea"]}, r"prior, expected a label 0..2 or a name of 3 classes; similar: bee$"),
        ("sample", (), {"classes": ["zebra"]}, r"a name of 3 classes; names: ant, bee, cat$"),
        ("sample", (), {"classes": 1}, "classes is 1, expected: a list of integers or strings$"),
        ("sample", (), {"cuont": 3}, "cuont"),
        ("sample", (), {"keep": 3}, "keep: is not an option here"),
        ("sample", (), {"count": 0}, "count is 0, expected"),
        ("complete", ([], 3), {}, "images: the list is empty"),
        ("complete", (torch.zeros(2, 3, 4, 4), 3), {}, r"images: found torch.float32 \[2, 3, 4, 4\], expected uint8"),
        ("complete", ([Image.new("RGB", (40, 40))], 3), {}, "the class of a given image is unknown"),
        ("reconstruct", ([3.5],), {}, "images: found list, expected uint8"),
        ("reconstruct", ([Image.new("F", (9, 9))],), {}, "image 0: is not a readable image"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(own, method, given, options, message):
    pipeline = digit_ds.load_pipeline(**own, device="cpu")
    with pytest.raises(UserError, match=message) as refused:
        getattr(pipeline, method)(*given, **options)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_loaded_is_refused(parts, own):
    with pytest.raises(UserError, match="vqgan"):
        digit_ds.load_pipeline(own["prior"], own["decoder"])
    with pytest.raises(UserError, match="expected a pixel decoder"):
        digit_ds.load_pipeline(own["prior"], vqgan=own["vqgan"])
    with pytest.raises(UserError, match=r"prior: .* is \(8, 8\)|grid is \(8, 8\)"):
        digit_ds.load_pipeline(own["prior"], parts["ar"], own["vqgan"])
    without = digit_ds.load_pipeline(parts["prior"], parts["ar"], parts["vqgan"], vqgan_config=parts["vqgan_config"])
    with pytest.raises(UserError, match="given images: needs the encoder's weights and the codebook"):
        without.reconstruct([Image.new("RGB", (8, 8))])
