"""Every command in README and docs is executed: here, in one chain over small stand-ins, or by a test that is named.

A command is run as it stands. ``PLACES`` says what its placeholders are, ``SMALL`` what makes it small; a block that is
in neither this chain nor ``ELSEWHERE`` is a failure, so a new one cannot be forgotten.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from preparation_parts import call, make_encoder, make_images, make_vqgan
from sklearn.datasets import load_digits
from test_slurm_chain import commands

from digit_ds import cli
from digit_ds.config import load_recipe
from digit_ds.data.feature_network import save_feature_network
from digit_ds.errors import run_command
from digit_ds.files import read_json
from digit_ds.model.released import read_model
from digit_ds.safe_load import load_npz
from digit_ds.training.metric_names import MEANINGS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "README.md: make demo": "tests/test_demo.py runs the small demo; .ci/run runs make test",
    "docs/digits.md: make demo": "tests/test_demo.py runs the small demo",
    "README.md: image ──encoder": "a picture, no command",
    "README.md: pip install": "tests/test_installed.py installs the package; its second line runs below",
    "docs/published.md: digit-ds publish": "tests/test_publish.py publishes to a hub",
    "CONTRIBUTING.md: graph TD": "a picture, no command",
    "docs/results.md: python -m digit_ds.demo.table": "hours of training; tests/test_demo_steps.py runs its steps",
}
"""Page and beginning of a block -> why it is not executed here. tests/test_slurm_chain.py executes all blocks of
docs/cluster.md on a real cluster."""

SMALL = {
    "features": ["--num-heads", "2"],
    "kmeans": ["--clusters", "16"],
    "tokenize": ["--num-heads", "2", "--vqgan-config", "vqgan.yaml"],
    "train": [
        *("training.steps=2", "training.global_batch=8", "training.micro_batch=8", "training.precision=fp32"),
        *("model.layers=1", "model.width=16", "model.heads=2", "schedule.warmup_steps=1", "data.workers=0"),
        *("training.compile=false",),
    ],
    "sample": ["--vqgan-config", "vqgan.yaml"],
    "probe": ["--passes", "1"],
}
"""Words that a command gets at its end; of an option given twice the last one counts."""
TRIAL_SCORES = "--features weights/trial_network.safetensors"
OWN_PICTURES = (ROOT / "docs" / "own_pictures.md").read_text(encoding="utf-8")
TRIAL = {
    "train": [
        *re.findall(r"^`(model\.layers=2 .*)`$", OWN_PICTURES, re.MULTILINE)[0].split(),
        *("training.steps=2", "training.global_batch=8", "training.micro_batch=8", "data.workers=0"),
    ]
}
"""Words of the pages that are run over the networks of ``digit-ds fetch trial``: those of a trial, with fewer steps."""
PLACES = {
    "--images DIR": "--images images",
    "--encoder WEIGHTS": "--encoder encoder.pth",
    "--inception-weights WEIGHTS": "--features network.safetensors",  # no Inception without a download
    "--vqgan CKPT": "--vqgan vqgan.ckpt",
    "--views N": "--views 2",
    "--count N": "--count 6",
    "--out SHARDS": "--out SHARDS/train",
    "--folder DIR": "--folder .",
    "RECIPE.yaml --gpus N": "prior.yaml --gpus 1",
    "verify SHARDS": "verify SHARDS/train",
    "--train SHARDS --val SHARDS": "--train SHARDS/train --val SHARDS/train",
    "--prior MODEL --decoder MODEL": "--prior prior --decoder decoder",
    "--model MODEL": "--model prior",
    "--reference DIR": "--reference SAMPLES/images",
    "RECIPE.yaml [section.key=value ...]": "prior.yaml run=runs/prior",
    "export RUN MODEL": "export runs/prior prior",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}: {self.text.lstrip()}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            found.append(Block(name, match[1], match[2]))
    return found


def block(page: str, beginning: str) -> str:
    (found,) = [found.text for found in blocks() if found.page == page and found.text.startswith(beginning)]
    return found


def run(words: str, verb: str, small: Mapping[str, list[str]] = SMALL) -> None:
    """Type a documented line in the working directory; but for training without a process of its own (imports)."""
    for placeholder, part in PLACES.items():
        words = re.sub(rf"{re.escape(placeholder)}(?!\w)", part, words)
    program, *line = shlex.split(words.replace("[", "").replace("]", ""), comments=True)
    line += small.get(verb, [])
    if program.startswith("tools/"):
        assert os.access(ROOT / program, os.X_OK)
        assert call(Path(program).stem, *line) == 0
    elif verb == "train":
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", program.replace("-", "_"), *line]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    else:
        assert program == "digit-ds"
        with pytest.raises(SystemExit) as ended:
            run_command(cli.run, line)
        assert not ended.value.code


def make_feature_network(path: Path) -> None:
    """What scores pictures in Inception's place, which would have to be downloaded."""
    pixels = load_digits().data[:8]
    weights = [torch.from_numpy(pixels.copy()), torch.eye(8, dtype=torch.float64)]
    save_feature_network(path, weights, [torch.zeros(8), torch.zeros(8)], side=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What a user has before the first command."""
    home = tmp_path_factory.mktemp("home")
    make_images(home / "images", 24)
    make_encoder(home / "encoder.pth")
    make_vqgan(home / "vqgan.ckpt")
    (home / "tools").symlink_to(ROOT / "tools")
    make_feature_network(home / "network.safetensors")
    for kind in ("prior", "ar"):
        recipe = yaml.safe_load((ROOT / "digit_ds" / "demo" / "prior.yaml").read_text(encoding="utf-8"))
        recipe["model"] |= {"kind": kind, "class_conditional": kind == "prior", "max_positions": 200}
        recipe["data"] = {"shards": "SHARDS/train", "workers": 0}
        recipe["training"].pop("class_dropout")
        recipe["run"], recipe["monitor"] = f"runs/{kind}", {"log_every": 1}
        (home / f"{'prior' if kind == 'prior' else 'decoder'}.yaml").write_text(yaml.safe_dump(recipe))
    return home


@pytest.fixture(scope="module")
def chain(home) -> Iterator[Path]:
    """After every row of README's table of commands; the working directory of what follows."""
    before = Path.cwd()
    os.chdir(home)
    table = re.findall(r"^\| \w+ \| `(digit-ds (\w+) [^`]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [verb for _, verb in table] == [
        *("doctor", "split", "features", "kmeans", "tokenize", "verify", "estimate", "plan", "train"),
        *("export", "sample", "evaluate", "statistics", "probe"),
    ]
    for line, verb in table:
        run(line, verb)
        if verb == "train":
            run("digit-ds train decoder.yaml", verb)
        if verb == "export":
            run("digit-ds export runs/ar decoder", verb)
    yield home
    os.chdir(before)


def test_the_table_of_commands_leads_from_pictures_to_scores(chain):
    assert read_json(chain / "FEATURES" / "manifest.json")["images"] == 24
    assert len(list((chain / "SAMPLES" / "images").glob("*.png"))) == 6
    assert read_json(chain / "scores.json")["samples"] == 6
    assert len(read_json(chain / "PROBE" / "probe.json")["layers"]) >= 1
    assert (chain / "reference.npz").is_file()
    assert read_model(chain / "prior").spec.classes == 3


def test_a_shipped_recipe_is_found_by_name(tmp_path, monkeypatch, capsys):
    """docs/own_pictures.md trains two of them."""
    monkeypatch.chdir(tmp_path)
    run(block("README.md", "pip install").splitlines()[1], "estimate")
    assert "219,377,664 parameters" in capsys.readouterr().out


def test_the_tools_of_the_preparation_page(chain):
    """The scripts write what the verbs wrote."""
    for line in block("docs/preparation.md", "tools/extract").splitlines():
        tool = re.search(r"tools/(\w+)", line)[1]
        verb = {"extract_features": "features", "train_kmeans": "kmeans", "tokenize_images": "tokenize"}.get(tool)
        line = line.replace("km.npy", "km2.npy").replace("[--points 26]", "")
        if tool == "verify_shards":
            line += " --num-heads 2 --vqgan-config vqgan.yaml"
        run(line, verb or tool)
    assert (chain / "km2.npy").read_bytes() == (chain / "km.npy").read_bytes()
    for path in sorted((chain / "SHARDS" / "train").rglob("*.mds*")):
        assert path.read_bytes() == (chain / "SHARDS_DIR" / path.relative_to(chain / "SHARDS" / "train")).read_bytes()
    assert (chain / "sheet.png").is_file()


def test_python_of_the_readme(chain):
    code = block("README.md", "import digit_ds")
    for shown, here in (
        ("weights/dinov2_vitb14_reg4_pretrain.pth", "encoder.pth"),
        ("layer=3", "layer=3, num_heads=2"),
        ("weights/km_8k.npy", "km.npy"),
        ('"weights/vqgan_of_base_decoder.ckpt"', '"vqgan.ckpt", vqgan_config="vqgan.yaml", num_heads=2'),
        ("weights/base_8k_stage1_cls", "prior"),
        ("weights/base_decoder", "decoder"),
        ("keep=128", "keep=32"),
    ):
        assert shown in code
        code = code.replace(shown, here)
    names = {"images": torch.rand(2, 3, 32, 32), "labels": torch.tensor([2, 0])}
    exec(code, names)
    drawn, completed, model = names["drawn"], names["completed"], names["model"]
    assert drawn.images.shape == (4, 3, 32, 32) and drawn.labels == [1] * 4
    assert completed.discriminative[:, :32].equal(names["again"].discriminative[:, :32])
    assert names["sequence"].input[:, 1:].equal(names["codes"] + 5)
    assert names["logits"].shape == (2, 65, model.spec.vocabulary.output_size)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Iterator[Path]:
    """After docs/own_pictures.md; the working directory of what follows."""
    home, before = tmp_path_factory.mktemp("own"), Path.cwd()
    make_images(home / "pictures", 24)
    os.chdir(home)
    run("digit-ds fetch trial", "fetch")
    trainings = []
    for line in lines_of("docs/own_pictures.md"):
        verb = shlex.split(line)[1]
        if verb == "train":
            trainings.append(line)
            continue
        if trainings:  # both stages at once, as on the page
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda training: run(training, "train", TRIAL), trainings))
            trainings = []
        run(smaller(line), verb, TRIAL)
    yield home
    os.chdir(before)


def lines_of(page: str) -> list[str]:
    """All lines of a page's blocks."""
    return [line for found in blocks() if found.page == page for line in found.text.splitlines() if line.strip()]


def smaller(line: str) -> str:
    """A line of the pages about own pictures, over the trial networks, with fewer pictures."""
    for shown, here in (
        ("--clusters 1024", "--clusters 16"),
        ("--count 5000", "--count 3"),
        ("--per-class 8", "--per-class 1"),
        ("--inception-weights weights/weights-inception-2015-12-05-6726825d.pth", TRIAL_SCORES),
        ("--size 256", "--size 128"),
    ):
        line = line.replace(shown, here)
    return line


def test_own_pictures_become_samples_and_scores(own):
    assert len(list((own / "split" / "val").rglob("*.*g"))) == 3
    assert (own / "own" / "sheet.png").is_file()
    assert read_model(own / "own" / "models" / "prior").spec.classes == 3
    scores = read_json(own / "own" / "scores.json")
    assert scores["samples"] == 3 and "own pictures, validation" in str(scores)


def test_the_how_to_page(own):
    (own / "more").symlink_to("own")
    for line in lines_of("docs/howto.md"):
        run(smaller(line), shlex.split(line)[1], TRIAL)
    assert len(read_json(own / "own" / "guidance" / "guidance.json")["tried"]) == 5
    kept, rebuilt = (
        load_npz(own / "own" / name / "tokens.npz", "discriminative")["discriminative"]
        for name in ("completed", "rebuilt")
    )
    assert (kept[:, :128] == rebuilt[:, :128]).all() and not (kept[:, 128:] == rebuilt[:, 128:]).all()
    weights = [own / "own" / "models" / name / "model.safetensors" for name in ("prior", "prior_again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    started = read_model(own / "own" / "models" / "prior").spec
    assert load_recipe(own / "own" / "tuned" / "recipe.yaml").model.width == started.width


def test_every_metric_of_a_run_is_in_the_reference(chain):
    lines = [json.loads(line) for line in (chain / "runs" / "prior" / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} <= MEANINGS.keys()


def test_the_preview_of_the_training_page(tmp_path):
    recipe = yaml.safe_load((ROOT / "ds_configs" / "base_prior.yaml").read_text(encoding="utf-8"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe) + block("docs/training.md", "preview:"))
    assert load_recipe(tmp_path / "recipe.yaml").preview.fid_samples == 2000


def test_the_page_of_published_weights(tmp_path, monkeypatch, capsys):
    """In order, with small models in the published layout that were copied."""
    monkeypatch.chdir(tmp_path)
    golden = ROOT / "tests" / "golden"
    for place, name in (
        ("outputs/base_8k_stage1/checkpoints/checkpoint_last.pt", "stage1_uncond_postnorm/checkpoint_last.pt"),
        ("outputs/base_8k_stage1_cls/checkpoints/checkpoint_last.pt", "stage1_cond_postnorm/checkpoint_last.pt"),
        ("outputs/base_8k_stage2_400epoch/checkpoints/checkpoint_last.pt", "stage2_ar/checkpoint_last.pt"),
        ("dinov2_vitb14_reg4_pretrain.pth", "dinov2/dinov2_reg4_tiny.pth"),
    ):
        (tmp_path / "copies" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copies" / place).symlink_to(golden / name)
    centroids = torch.load(golden / "stage2_ar" / "checkpoint_last.pt", weights_only=True)["model"]["centroids"]
    np.save(tmp_path / "copies" / "km_8k.npy", centroids.T.numpy())
    (tmp_path / "vqgan.yaml").symlink_to(golden / "vqgan" / "config.yaml")
    make_images(tmp_path / "pictures", 2)
    make_images(tmp_path / "data" / "imagenet" / "val", 4)
    make_feature_network(tmp_path / "network.safetensors")
    lines = [line for line in lines_of("docs/published.md") if "fetch trial" not in line]
    verbs = [shlex.split(line)[1] for line in lines]
    assert verbs == ["fetch", *["sample"] * 3, "fetch", *["sample"] * 2, "evaluate", "publish"]
    for line, verb in zip(lines[:-1], verbs):
        for shown, here in (
            ("fetch base", "fetch base --from copies"),
            ("--encoder ", "--num-heads 2 --encoder "),
            ("--count 64", "--count 2"),
            ("--count 50000", "--count 4"),
            ("--per-class 8", "--per-class 1"),
            (" --vqgan-compile", ""),  # a minute of compilation
            ("--inception-weights weights/weights-inception-2015-12-05-6726825d.pth", "--features network.safetensors"),
        ):
            line = line.replace(shown, here)
        run(line, verb)
        if verb == "fetch" and "--prior" not in line:
            assert capsys.readouterr().out.strip().splitlines()[-1] == lines[1].replace("--count 64 ", "")
    pictures = {
        name: len(list((tmp_path / name / "images").glob("*.png"))) for name in ("samples", "rebuilt", "classes")
    }
    assert pictures == {"samples": 2, "rebuilt": 2, "classes": 4}
    rebuilt, completed = (
        load_npz(tmp_path / name / "tokens.npz", "discriminative") for name in ("rebuilt", "completed")
    )
    kept = rebuilt["discriminative"] == completed["discriminative"]
    assert kept[:, :128].all() and not kept[:, 128:].all()
    assert read_json(tmp_path / "scores.json")["samples"] == 4


def test_the_page_of_published_weights_without_a_download(tmp_path, monkeypatch, capsys):
    """As it says: all but ``fetch base`` as it stands, with the features of the trial's own network; fewer pictures."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "pictures", 2)
    make_images(tmp_path / "data" / "imagenet" / "val", 4)
    lines = [line for line in lines_of("docs/published.md") if "fetch base" not in line and "publish" not in line]
    for line in lines:
        verb = shlex.split(line)[1]
        for shown, here in (
            ("--count 64 ", "--count 2 "),
            ("--count 50000", "--count 4"),
            ("--per-class 8", "--per-class 1"),
            (" --vqgan-compile", ""),
            ("--inception-weights weights/weights-inception-2015-12-05-6726825d.pth", TRIAL_SCORES),
            ("--size 256", "--size 128"),
            ("--size 256", "--size 128"),
        ):
            line = line.replace(shown, here)
        run(line, verb, {})
        if verb == "fetch":
            assert capsys.readouterr().out.strip().splitlines()[-1] == lines[1].replace("--count 64 ", "")
    assert len(list((tmp_path / "classes" / "images").glob("*.png"))) == 4
    picture = next((tmp_path / "samples" / "images").glob("*.png"))
    assert Image.open(picture).size == (128, 128)
    assert read_json(tmp_path / "scores.json")["samples"] == 4


def test_no_block_is_forgotten():
    here = ("README.md: import digit_ds", "docs/preparation.md: tools/extract", "docs/training.md: preview:")
    cluster = [found.text for found in blocks() if found.page == "docs/cluster.md"]
    typed = commands(ROOT / "docs" / "cluster.md")
    assert all(line in typed for text in cluster for line in text.splitlines() if line.strip())
    whole = (
        "docs/cluster.md: ",
        "docs/howto.md: digit-ds ",
        "docs/own_pictures.md: digit-ds ",
        "docs/published.md: digit-ds ",
    )
    known = (*here, *ELSEWHERE, *whole)
    assert [found.name[:80] for found in blocks() if not found.name.startswith(known)] == []
    for name in (*here, *ELSEWHERE):
        assert any(found.name.startswith(name) for found in blocks()), f"{name} is in no page any more"
