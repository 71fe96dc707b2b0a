"""The linear probe: golden features, gradients, and a problem that only a middle layer solves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import probe
from golden_models import GOLDEN, golden_model
from small_models import CLASSES, GRID, small_spec
from torch.nn import functional

from digit_ds.data.shards import ShardManifest, merge_blocks, write_block
from digit_ds.errors import UserError
from digit_ds.evaluation import linear_probe
from digit_ds.evaluation.linear_probe import Classifiers, pooled_states
from digit_ds.model.released import save_model
from digit_ds.model.weights import initial_state


@pytest.mark.parametrize("name", ["postnorm", "prenorm"])
def test_features_are_the_golden_ones(name):
    with np.load(GOLDEN / "linear_probe/expected.npz") as expected:
        tokens = torch.from_numpy(expected["src_tokens"])
        features = pooled_states(golden_model(f"stage1_uncond_{name}"), tokens[:, 1:] - 5)
        np.testing.assert_allclose(features.numpy(), expected[f"features_{name}"], atol=1e-4)


def test_written_out_sgd_equals_torch_optim():
    torch.manual_seed(0)
    features, labels = torch.randn(6, 2, 40, 8), torch.randint(0, 5, (6, 40))
    ours = Classifiers(2, 8, 5, [0.1, 0.7], "cpu")
    theirs = [[torch.nn.Linear(8, 5) for _ in range(2)] for _ in range(2)]
    optimizers = []
    for rate, layers in zip([0.1, 0.7], theirs):
        for layer in layers:
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
            optimizers.append(torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9))
    for step in range(6):
        ours.step(features[step], labels[step], 1.0, 40)
        for layers in theirs:
            for number, layer in enumerate(layers):
                functional.cross_entropy(layer(features[step, number]), labels[step]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for rate in range(2):
        for layer in range(2):
            torch.testing.assert_close(ours.weight[rate, layer].T, theirs[rate][layer].weight.data)
            torch.testing.assert_close(ours.bias[rate, layer, 0], theirs[rate][layer].bias.data)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A class-conditional prior, and shards whose label is how often code 7 occurs: readable from the embeddings."""
    root = tmp_path_factory.mktemp("probe")
    spec = small_spec("prior", CLASSES)
    save_model(root / "prior", spec, initial_state(spec, 0), {"codebook_sha256": "c" * 64})
    generator = np.random.default_rng(0)
    for name, count in (("train", 240), ("val", 90)):
        samples = []
        for index in range(count):
            label = int(generator.integers(CLASSES))
            codes = generator.integers(8, 24, GRID[0] * GRID[1], dtype=np.uint16)
            codes[generator.permutation(len(codes))[: 4 * label]] = 7
            samples.append({"discriminative": codes, "label": label, "image_id": f"{index}", "index": index, "view": 0})
        write_block(root / name / "block-00000", samples, samples[0])
        index_hash = merge_blocks(root / name, ["block-00000"])
        provenance = {"codebook_sha256": "c" * 64}
        ShardManifest(count, 1, ["a", "b", "c"], list(GRID), 8, 24, 0, "training", provenance, 0, index_hash).write(
            root / name
        )
    return root


def test_probe_reads_what_is_there_and_repeats(parts, tmp_path, monkeypatch, capsys):
    result = probe(parts / "prior", parts / "train", parts / "val", tmp_path / "out", passes=20, batch=48)
    assert result == json.loads((tmp_path / "out/probe.json").read_text())
    assert result["best_accuracy"] > 0.95 and [row["layer"] for row in result["layers"]] == [0, 1]
    assert (tmp_path / "out/probe.png").stat().st_size > 5000
    capsys.readouterr()
    assert probe(parts / "prior", parts / "train", parts / "val", tmp_path / "out", passes=20, batch=48) == result
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="expected the same settings or a new --out folder"):
        probe(parts / "prior", parts / "train", parts / "val", tmp_path / "out", passes=3)
    monkeypatch.setattr(linear_probe, "CACHE_BYTES", 0)
    again = probe(parts / "prior", parts / "train", parts / "val", tmp_path / "again", passes=20, batch=48)
    assert again["layers"] == result["layers"]


def test_two_processes_find_the_same(parts, tmp_path):
    alone = probe(parts / "prior", parts / "train", parts / "val", tmp_path / "one", passes=5, batch=48)
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\nfrom digit_ds.evaluation.linear_probe import probe\n"
        "from digit_ds.evaluation.settings import ProbeSettings\n"
        "root, out = sys.argv[1:]\n"
        "parts = {'model': f'{root}/prior', 'train': f'{root}/train', 'val': f'{root}/val'}\n"
        "probe(ProbeSettings(**parts, out=out, passes=5, batch=48))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, script, parts, tmp_path / "two"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two/probe.json").read_text())
    for ours, theirs in zip(alone["layers"], two["layers"]):
        assert ours["by_learning_rate"] == pytest.approx(theirs["by_learning_rate"], abs=0.012)  # one of 90 samples


def test_foreign_shards_and_models_are_refused(parts, tmp_path):
    spec = small_spec("ar")
    save_model(tmp_path / "ar", spec, initial_state(spec, 0), {})
    with pytest.raises(UserError, match="has kind ar, expected prior or vq to probe"):
        probe(tmp_path / "ar", parts / "train", parts / "val", tmp_path / "out")
    spec = small_spec("prior")
    save_model(tmp_path / "other", spec, initial_state(spec, 0), {"codebook_sha256": "d" * 64})
    with pytest.raises(UserError, match=r"other: belongs to codebook dddddddddddd .*, but shards .*train to codebook"):
        probe(tmp_path / "other", parts / "train", parts / "val", tmp_path / "out")
    assert not (tmp_path / "out").exists()
