"""The search for guidance: each combination is the sampling job and the score that the verbs make, and it continues."""

from pathlib import Path

import pytest
import torch
from calls import evaluate, sample, search_guidance
from small_models import write_models

from digit_ds.data.feature_network import save_feature_network
from digit_ds.errors import UserError
from digit_ds.files import read_json
from digit_ds.generation.job import SamplingJob


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Options of ``sample`` and of scoring; the reference is drawn with other random numbers."""
    root = tmp_path_factory.mktemp("parts")
    models = write_models(root / "models")
    drawing = {"prior": models["prior"], "decoder": models["ar"], "vqgan": models["vqgan.ckpt"], "count": 12}
    drawing["vqgan_config"] = models["vqgan.yaml"]
    sample(root / "reference", seed=1, **drawing)
    torch.manual_seed(0)
    weights = [torch.randn(8, 64), torch.eye(8)]
    save_feature_network(root / "network.safetensors", weights, [torch.zeros(8), torch.zeros(8)], side=8)
    scoring = {"reference": root / "reference" / "images", "features": root / "network.safetensors"}
    return drawing, scoring


def test_a_search_that_was_interrupted_gives_what_the_verbs_give(parts, tmp_path, monkeypatch):
    drawing, scoring = parts
    search = {**drawing, **scoring, "scales": [1.0, 9.0], "exponents": [0.5, 2.0]}
    write = SamplingJob.write_block

    def fail(self: SamplingJob, *block: object) -> None:
        if self.out.name == "power-cosine-scale-9.0-exponent-2.0":
            raise KeyboardInterrupt
        write(self, *block)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(SamplingJob, "write_block", fail)
        search_guidance(tmp_path / "out", **search)
    partial = read_json(tmp_path / "out" / "guidance.json")
    assert partial["left"] == 1 and len(partial["tried"]) == 2  # without guidance no exponent makes a difference
    pictures = tmp_path / "out" / "samples" / "unguided" / "images"
    before = {path: path.stat().st_mtime_ns for path in pictures.iterdir()}

    found = search_guidance(tmp_path / "out", **search)
    assert {path: path.stat().st_mtime_ns for path in pictures.iterdir()} == before
    assert found == read_json(tmp_path / "out" / "guidance.json")
    assert found["tried"][:2] == partial["tried"] and found["left"] == 0
    assert [(entry["scale"], entry["exponent"]) for entry in found["tried"]] == [(1.0, 1.0), (9.0, 0.5), (9.0, 2.0)]
    assert found["best"]["fid"] == min(entry["fid"] for entry in found["tried"])
    assert len({entry["fid"] for entry in found["tried"]}) == 3

    chosen = {"guidance": 9.0, "guidance_schedule": "power-cosine", "guidance_exponent": 2.0}
    sample(tmp_path / "alone", **drawing, **chosen)
    scores = evaluate(tmp_path / "alone", out=tmp_path / "scores.json", **scoring)
    assert scores["fid"] == found["tried"][2]["fid"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": 2.0}, "guidance and guidance_exponent are searched, expected scales and exponents"),
        ({"guidance_schedule": "cosine", "exponents": [2.0]}, "exponents are given, but guidance_schedule is cosine"),
        ({"count": None}, "count and per_class are not given, expected one of them"),
        ({"scales": []}, "scales"),
        ({"reference": "nowhere"}, "nowhere"),
        ({"features": None}, "Inception weights: no file was given"),
        ({"prior": "unconditional", "scales": [1.0, 2.0]}, r"unconditional: is unconditional, but guidance scale is 2"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_drawn(parts, tmp_path: Path, change, message):
    drawing, scoring = parts
    if "prior" in change:
        change = {**change, "prior": drawing["prior"].with_name(change["prior"])}
    with pytest.raises(UserError, match=message):
        search_guidance(tmp_path / "out", **{**drawing, **scoring, "scales": [2.0], **change})
    assert not (tmp_path / "out").exists()
