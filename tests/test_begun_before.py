"""Output directories that an earlier version began, with this project's own code of then, go on."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from calls import extract_features, train_kmeans
from preparation_parts import make_images

from digit_ds.clustering.settings import KMeansSettings
from digit_ds.demo.steps import claim
from digit_ds.errors import UserError
from digit_ds.evaluation.settings import ProbeSettings
from digit_ds.generation.job import SamplingJob
from digit_ds.generation.settings import Decoding, SampleSettings

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def begun(tmp_path) -> Path:
    """``features`` has the first of two chunks, ``km.run`` the state after two of four iterations."""
    return Path(shutil.copytree(GOLDEN / "begun", tmp_path / "begun"))


def test_features(begun, tmp_path):
    out, first = begun / "features", (begun / "features/chunk-00000.npy").read_bytes()
    settings = {"workers": 0, "block_images": 2, "points": 4, "num_heads": 2}
    images, encoder = make_images(tmp_path / "images", 4), GOLDEN / "dinov2/dinov2_reg4_tiny.pth"
    with pytest.raises(UserError, match="whose seed is 0, but this one's is 1"):
        extract_features(images, encoder, out, seed=1, **settings)
    extract_features(images, encoder, out, **settings)
    assert json.loads((out / "manifest.json").read_text())["count"] == 16
    assert (out / "chunk-00000.npy").read_bytes() == first


def test_kmeans(begun, monkeypatch, capsys):
    monkeypatch.chdir(begun)
    with pytest.raises(UserError, match="whose iterations is 4, but this one's is 5"):
        train_kmeans("points.npy", 4, "km.npy", iterations=5, backend="torch")
    train_kmeans("points.npy", 4, "km.npy", iterations=4, backend="torch")
    assert "continuing after iteration 2 of 4" in capsys.readouterr().out
    np.testing.assert_allclose(np.load("km.npy"), np.load("km_expected.npy"), rtol=1e-6)


def test_samples_and_demo(begun):
    settings = {"seed": 3, "precision": "float64", "prior_decoding": None, "classes": [0, 1]}
    with pytest.raises(UserError, match="holds a job whose seed is 3, but this one's is 4"):
        SamplingJob(begun / "samples", settings | {"seed": 4}, [0, 1], []).begin()
    with SamplingJob(begun / "samples", settings, [0, 1], ["ant", "bee"]).begin() as directory:
        assert directory.found is False
    with claim(begun / "demo", "demo.json", {"small": True}) as directory:
        assert directory.found is True


def test_records_come_from_the_settings_as_earlier_versions_wrote_them():
    """What stands in the directories of earlier versions, field by field; an option added later keeps them matching."""
    kmeans = KMeansSettings(features="f", clusters=4, out="k.npy", backend="torch")
    assert kmeans.record() == {"clusters": 4, "iterations": 20, "seed": 0, "init": "random"}
    probe = ProbeSettings(model="m", train="t", val="v", out="o")
    assert probe.record() == {"passes": 30, "batch": 256, "learning_rates": [0.05, 0.1, 0.2, 0.4, 0.8], "seed": 0}
    sampling = SampleSettings(out="o", vqgan="v", prior="p", seed=3, guidance=2.5, top_k=9, decoder_top_p=0.8)
    assert sampling.record() == {"seed": 3}
    assert sampling.prior_decoding.record() == {
        "temperature": 1.0,
        "top_k": 9,
        "top_p": None,
        "guidance": {"scale": 2.5, "schedule": "constant", "interval": [0.0, 1.0]},
        "steps": 8,
        "choice_temperature": 4.5,
    }
    late = SampleSettings(out="o", vqgan="v", guidance=8, guidance_schedule="power-cosine", guidance_exponent=1.2)
    assert late.record() == {"seed": 0} and late.prior_decoding.record()["guidance"]["exponent"] == 1.2
    assert sampling.pixel_decoding.record()["top_p"] == 0.8

    class Younger(ProbeSettings):
        momentum: float = 0.9

    @dataclass(frozen=True)
    class YoungerDecoding(Decoding):
        min_p: float = 0.0

    assert Younger.read(probe.model_dump()).record() == probe.record()
    assert Younger.read(probe.model_dump() | {"momentum": 0.5}).record() == probe.record() | {"momentum": 0.5}
    assert YoungerDecoding().record() == Decoding().record()
    assert YoungerDecoding(min_p=0.1).record() == Decoding().record() | {"min_p": 0.1}
