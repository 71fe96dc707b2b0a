"""A model published to a hub on 127.0.0.1 and read back by its address, by the real client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import serving
from small_models import small_spec, write_models

from digit_ds import hub as addresses
from digit_ds.errors import UserError
from digit_ds.model.released import WEIGHTS
from digit_ds.publishing.card import model_card

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


def run(hub, home: Path, *words: object, token: str | None = "hf_good") -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.address, "HF_HOME": str(home / "hf")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if token is None else {"HF_TOKEN": token})
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_published_model_is_read_by_its_address(hub, models, tmp_path):
    scores = {"fid": 3.391234, "inception_score": 205.96, "samples": 50000, "features": "inception-v3"}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "recipe.yaml").write_text("run: runs/prior\n")
    words = ("-m", "digit_ds", "publish", models["prior"], "someone/small")
    status, out, errors = run(hub, tmp_path, *words, "--scores", "scores.json", "--recipe", "recipe.yaml")
    assert status == 0 and 'digit_ds.load_model("hf://someone/small")' in out, errors
    found = hub.files["someone/small"]
    assert found.keys() == {"README.md", "config.json", WEIGHTS}
    assert found[WEIGHTS] == (models["prior"] / WEIGHTS).read_bytes()
    card = found["README.md"].decode()
    for part in ("license: mit", "| FID | 3.391 |", "50000 pictures", "run: runs/prior", "Apache-2.0", "c" * 64):
        assert part in card
    assert len([path for method, path, _ in hub.requests if method == "POST" and "/commit/" in path]) == 1

    hub.closed.add("someone/small")
    parts = {"decoder": models["ar"], "vqgan": models["vqgan.ckpt"], "vqgan-config": models["vqgan.yaml"]}
    words = ["sample", "--prior", "hf://someone/small", "--count", "3", "--out", "pictures"]
    words += [word for name, path in parts.items() for word in (f"--{name}", str(path))]
    script = (
        "import digit_ds, torch; from digit_ds import cli; tokens = torch.tensor([[2, 5, 6, 7, 8, 9]]); "
        f"ours = digit_ds.load_model({str(models['prior'])!r}); theirs = digit_ds.load_model('hf://someone/small'); "
        f"assert torch.equal(ours(tokens), theirs(tokens)); cli.run({words!r})"
    )
    status, _, errors = run(hub, tmp_path, "-c", script)
    assert status == 0, errors
    assert len(list((tmp_path / "pictures" / "images").glob("*.png"))) == 3


def test_what_cannot_be_published_says_so(hub, models, tmp_path):
    words = ("-m", "digit_ds", "publish", models["prior"], "someone/small")
    status, _, errors = run(hub, tmp_path, *words, token=None)
    assert (status, errors.count("\n")) == (2, 1) and "401 Invalid username or password." in errors
    assert hub.files == {}
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", WEIGHTS):
        (broken / name).write_bytes((models["prior"] / name).read_bytes()[: None if name == "config.json" else 2000])
    before = len(hub.requests)
    status, _, errors = run(hub, tmp_path, *words[:3], broken, "someone/small")
    assert status == 2 and "broken/model.safetensors" in errors and len(hub.requests) == before


def test_what_is_no_address_is_refused(models):
    assert addresses.parse("hf://owner/name.v1@refs/pr/1") == ("owner/name.v1", "refs/pr/1")
    for address in ("hf://owner", "hf://a/b/c", "hf://../b", "hf://a/b@"):
        with pytest.raises(UserError, match="expected hf://OWNER/NAME"):
            addresses.parse(address)


def test_scores_of_another_kind_are_refused():
    with pytest.raises(UserError, match="holds none of fid, inception_score"):
        model_card("a/b", small_spec("prior"), {}, "mit", {"layers": []})
    card = model_card("a/b", small_spec("nar"), {"steps": 7, "images": 70}, "mit")
    assert "Scores" not in card and "Trained for 7 steps, 70 images." in card and "The recipe is not stated." in card
