"""Scores: identities that must hold, and equality with torch-fidelity called directly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from calls import evaluate, save_statistics
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from small_models import small_spec
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from transformers import Dinov2Config, Dinov2Model

from digit_ds.data.feature_network import load_feature_network, save_feature_network
from digit_ds.errors import UserError
from digit_ds.evaluation import fidelity
from digit_ds.evaluation.extractors import feature_network
from digit_ds.evaluation.pictures import prepare
from digit_ds.publishing.card import model_card

COUNT = 300
HOME = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two folders of real digits, one of them as an array too, their labels, and a classifier trained on all."""
    root = tmp_path_factory.mktemp("parts")
    digits = load_digits()
    grey = np.rint(digits.images * 255 / 16).astype(np.uint8)
    pictures = np.repeat(np.repeat(grey, 4, 1), 4, 2)[..., None].repeat(3, -1)
    few = {"few": slice(0, 30), "others": slice(30, 70)}
    for name, chosen in ({"one": slice(0, COUNT), "two": slice(COUNT, 3 * COUNT)} | few).items():
        (root / name).mkdir()
        for number, picture in enumerate(pictures[chosen]):
            Image.fromarray(picture).save(root / name / f"{number:06d}.png")
    np.savez(root / "one.npz", arr_0=pictures[:COUNT], arr_1=digits.target[:COUNT])
    manifest = {"labels": digits.target[:COUNT].tolist()}
    (root / "manifest.json").write_text(json.dumps(manifest))
    mean, scale = 0.3, 0.4
    classifier = MLPClassifier((32, 16), random_state=0, max_iter=300).fit(
        (grey.reshape(-1, 64) / 255 - mean) / scale, digits.target
    )
    weights = [torch.from_numpy(weight.T.copy()) for weight in classifier.coefs_]
    biases = [torch.from_numpy(bias) for bias in classifier.intercepts_]
    save_feature_network(root / "judge.safetensors", weights, biases, side=8, mean=mean, scale=scale)
    expected = classifier.predict_proba((grey[:COUNT].reshape(-1, 64) / 255 - mean) / scale)
    return root, pictures, expected, digits.target[:COUNT]


def test_an_mlp_classifier_is_stored_without_loss(parts):
    root, pictures, expected, _ = parts
    network = load_feature_network(root / "judge.safetensors")
    features, logits = network(torch.from_numpy(pictures[:COUNT]).permute(0, 3, 1, 2))
    assert features.shape == (COUNT, 16) and (features >= 0).all()
    np.testing.assert_allclose(logits.softmax(-1).numpy(), expected, atol=1e-5)


def test_figures_equal_those_of_torch_fidelity_called_directly(parts, tmp_path):
    root, *_ = parts
    result = evaluate(
        root / "one", root / "two", tmp_path / "out.json", features=root / "judge.safetensors", precision_recall=True
    )
    direct = torch_fidelity.calculate_metrics(
        input1=str(root / "one"),
        input2=str(root / "two"),
        feature_extractor=feature_network(root / "judge.safetensors").name,
        **{
            "fid": True,
            "isc": True,
            "prc": True,
            "cuda": False,
            "cache": False,
            "verbose": False,
            "save_cpu_ram": True,
        },
    )
    assert result["fid"] == pytest.approx(direct["frechet_inception_distance"], abs=1e-6)
    assert result["inception_score"] == pytest.approx(direct["inception_score_mean"], abs=1e-9)
    assert result["precision"] == direct["precision"] and result["recall"] == direct["recall"]
    assert json.loads((tmp_path / "out.json").read_text()) == result


def test_fid_is_the_written_out_formula(parts, tmp_path):
    root, pictures, *_ = parts
    result = evaluate(root / "one", root / "two", tmp_path / "out.json", features=root / "judge.safetensors")
    network = load_feature_network(root / "judge.safetensors")
    features = network(torch.from_numpy(pictures[: 3 * COUNT]).permute(0, 3, 1, 2))[0].double().numpy()
    one, two = features[:COUNT], features[COUNT:]
    sigma_1, sigma_2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    values, vectors = np.linalg.eigh(sigma_1)
    root_1 = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_1 @ sigma_2 @ root_1).clip(0)).sum()
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(sigma_1) + np.trace(sigma_2) - 2 * cross
    assert result["fid"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


def test_a_folder_against_itself_and_as_an_array(parts, tmp_path, capsys):
    root, *_ = parts
    judge = root / "judge.safetensors"
    same = evaluate(root / "one", root / "one", tmp_path / "same.json", features=judge)
    assert abs(same["fid"]) < 1e-3
    printed = capsys.readouterr()
    assert f"{COUNT} samples against {COUNT} pictures of {root / 'one'}" in printed.out
    assert "not Inception" in printed.out and "fewer than 50000" in printed.err
    assert same["samples"] == same["reference_samples"] == COUNT and same["reference"] == str(root / "one")
    folder = evaluate(root / "one", root / "two", tmp_path / "folder.json", features=judge)
    array = evaluate(root / "one.npz", root / "two", tmp_path / "array.json", features=judge)
    assert folder["fid"] == array["fid"] and folder["inception_score"] == array["inception_score"]


def test_statistics_and_cache_change_no_figure(parts, tmp_path):
    root, *_ = parts
    judge = root / "judge.safetensors"
    direct = evaluate(root / "one", root / "two", tmp_path / "a.json", features=judge)
    command = [sys.executable, str(HOME / "tools" / "save_statistics.py"), "--reference", str(root / "two")]
    command += ["--features", str(judge), "--out", str(tmp_path / "two.npz")]
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert f"mean and covariance of {2 * COUNT} pictures of {root / 'two'}" in done.stdout, done.stderr
    saved = evaluate(root / "one", tmp_path / "two.npz", tmp_path / "b.json", features=judge)
    assert saved["fid"] == pytest.approx(direct["fid"], abs=1e-6)
    assert saved["inception_score"] == direct["inception_score"]
    for _ in range(2):
        cached = evaluate(root / "one", root / "two", tmp_path / "c.json", features=judge, cache=tmp_path / "cache")
        assert cached["fid"] == direct["fid"]
    files = sorted((tmp_path / "cache").iterdir())
    swapped = evaluate(root / "two", root / "one", tmp_path / "d.json", features=judge, cache=tmp_path / "cache")
    assert swapped["fid"] == pytest.approx(direct["fid"], abs=1e-6)
    assert sorted((tmp_path / "cache").iterdir()) == files  # content decides, not which input it is


def test_statistics_of_another_network_are_refused(parts, tmp_path):
    root, *_ = parts
    judge = root / "judge.safetensors"
    save_statistics(root / "two", tmp_path / "two.npz", features=judge)
    with np.load(tmp_path / "two.npz") as saved:
        arrays = dict(saved)
    assert str(arrays["network"]).startswith("feature-network-")
    np.savez(tmp_path / "other.npz", **arrays | {"network": "inception-v3-compat-0123456789ab"})
    with pytest.raises(UserError, match=r"other.npz: holds statistics of inception-v3-compat-0123456789ab, expected"):
        evaluate(root / "one", tmp_path / "other.npz", tmp_path / "a.json", features=judge)
    assert not (tmp_path / "a.json").exists()
    np.savez(tmp_path / "foreign.npz", mu=arrays["mu"], sigma=arrays["sigma"])  # ADM's files hold no more
    evaluate(root / "one", tmp_path / "foreign.npz", tmp_path / "b.json", features=judge)
    with pytest.raises(UserError, match="a name that ends in"):
        save_statistics(root / "two", tmp_path / "two.json", features=judge)


def test_class_accuracy(parts, tmp_path):
    root, _, expected, labels = parts
    judge = root / "judge.safetensors"
    share = (expected.argmax(-1) == labels).mean()
    for given, asked in ((root / "one", root / "manifest.json"), (root / "one.npz", root / "one.npz")):
        result = evaluate(given, root / "two", tmp_path / "out.json", features=judge, classifier=judge, labels=asked)
        assert result["class_accuracy"] == pytest.approx(share)
    with pytest.raises(UserError, match=r"holds no labels of 600 pictures"):
        evaluate(
            root / "two",
            root / "one",
            tmp_path / "x.json",
            features=judge,
            classifier=judge,
            labels=root / "manifest.json",
        )


def test_a_classifier_of_other_classes_is_refused(parts, tmp_path):
    """As many classes in another order: the accuracy would be wrong in silence."""
    root, *_ = parts
    network = load_feature_network(root / "judge.safetensors")
    weights, biases = [layer.weight for layer in network.layers], [layer.bias for layer in network.layers]
    given = {"side": 8, "mean": network.mean, "scale": network.scale}
    names = [str(label) for label in range(10)]
    save_feature_network(tmp_path / "judge.safetensors", weights, biases, **given, classes=[*names[:8], "9", "8"])
    labels = json.loads((root / "manifest.json").read_text())["labels"]
    (tmp_path / "asked.json").write_text(json.dumps({"labels": labels, "classes": names}))
    options = {"features": root / "judge.safetensors", "labels": tmp_path / "asked.json"}
    with pytest.raises(UserError, match=r"label 8 is class '8', but '9' in classifier .*judge\.safetensors"):
        evaluate(root / "one", root / "two", tmp_path / "o.json", **options, classifier=tmp_path / "judge.safetensors")
    save_feature_network(tmp_path / "judge.safetensors", weights, biases, **given, classes=names)
    judged = evaluate(
        root / "one", root / "two", tmp_path / "o.json", **options, classifier=tmp_path / "judge.safetensors"
    )
    assert judged["class_accuracy"] > 0.9
    with pytest.raises(UserError, match="has wrong class names, expected a list of 10"):
        save_feature_network(tmp_path / "judge.safetensors", weights, biases, **given, classes=names[:3])
        load_feature_network(tmp_path / "judge.safetensors")


def test_reference_preparations():
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for preparation in ("published", "adm"):
        assert prepare(image, preparation, 32).size == (32, 32)
    halved = image.resize((75, 50), Image.Resampling.BOX).resize((48, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(prepare(image, "adm", 32)), np.asarray(halved.crop((8, 0, 40, 32))))
    published = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])(image)
    assert np.array_equal(np.asarray(prepare(image, "published", 32)), np.asarray(published))
    assert not np.array_equal(np.asarray(prepare(image, "adm", 32)), np.asarray(published))


def test_what_is_missing_is_one_sentence(parts, tmp_path):
    root, *_ = parts
    judge = root / "judge.safetensors"
    out = tmp_path / "out.json"
    with pytest.raises(
        UserError,
        match=r"Inception weights: no file was given.*\(--inception-weights\), or a feature network \(--features\)",
    ):
        evaluate(root / "one", root / "two", out)
    (tmp_path / "code.pth").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match="holds objects other than tensors"):
        evaluate(root / "one", root / "two", out, inception_weights=tmp_path / "code.pth")
    with pytest.raises(UserError, match="is no folder, expected a folder of images"):
        evaluate(tmp_path / "nothing", root / "two", out, features=judge)
    (tmp_path / "judge.safetensors").write_bytes(judge.read_bytes()[:100])
    with pytest.raises(UserError, match="expected a feature network"):
        evaluate(root / "one", root / "two", out, features=tmp_path / "judge.safetensors")
    (tmp_path / "odd").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "odd/a.png")
    (tmp_path / "odd/b.png").write_bytes((tmp_path / "odd/a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"odd/b\.png: is not a readable image"):
        evaluate(tmp_path / "odd", root / "two", out, features=judge)
    assert not out.exists()


def test_what_a_loader_process_refuses_is_one_sentence(parts, tmp_path, monkeypatch):
    root, *_ = parts
    monkeypatch.setattr(fidelity, "FEW", 0)  # all pictures are loaded by processes
    whole, folder = (root / "one" / "000000.png").read_bytes(), tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(whole)  # torch-fidelity reads the first one itself
    (folder / "broken.png").write_bytes(whole[:40])
    reference = fidelity.OnlineFid(folder, features=root / "judge.safetensors")
    for work in (
        lambda: save_statistics(folder, tmp_path / "out.npz", features=root / "judge.safetensors"),
        lambda: reference.figures(np.zeros((4, 32, 32, 3), np.uint8)),
    ):
        with pytest.raises(UserError) as refused:
            work()
        assert str(refused.value).startswith(f"{folder / 'broken.png'}: is not a readable image")
    assert not (tmp_path / "out.npz").exists()


def _noise(folder: Path, *sides: int) -> Path:
    """A folder of pictures of noise, one for each of ``sides``."""
    folder.mkdir(parents=True)
    for number, side in enumerate(sides):
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:06d}.png")
    return folder


def test_a_sampling_job_is_scored_by_its_pictures_alone(parts, tmp_path):
    root, *_ = parts
    judge, job = root / "judge.safetensors", tmp_path / "job"
    _noise(job / "images", *[32] * 6)
    Image.new("RGB", (100, 70)).save(job / "grid.png")
    manifest = {"format": 1, "complete": True, "count": 6, "labels": [0] * 6, "classes": [], "settings": {}}
    (job / "manifest.json").write_text(json.dumps(manifest))
    options = {"features": judge, "batch": 1}  # with one picture a batch no difference of size is seen
    result = evaluate(job, root / "one", tmp_path / "job.json", **options)
    alone = evaluate(job / "images", root / "one", tmp_path / "images.json", **options)
    assert result["samples"] == 6 and result["fid"] == alone["fid"]
    for changed, message in (
        ({"complete": False}, "is a sampling job that is not complete"),
        ({"count": 5}, "holds 6 pictures, expected the 5 of its manifest.json"),
    ):
        (job / "manifest.json").write_text(json.dumps(manifest | changed))
        with pytest.raises(UserError, match=message):
            evaluate(job, root / "one", tmp_path / "x.json", **options)


def test_pictures_of_different_sizes_are_refused_or_made_equal(parts, tmp_path, monkeypatch):
    root, *_ = parts
    options = {"features": root / "judge.safetensors"}
    samples, mixed = _noise(tmp_path / "samples", *[32] * 4), _noise(tmp_path / "mixed", 32, 48, 40)
    large, one = _noise(tmp_path / "large", *[48] * 4), _noise(tmp_path / "one", 32)
    (tmp_path / "empty").mkdir()
    for given, reference, message in (
        (samples, mixed, r"mixed/000001.png: has 48 x 48 pixels and 000000.png 32 x 32, expected pictures of one size"),
        (mixed, samples, r"mixed/000001.png: has 48 x 48 pixels"),
        (samples, large, r"large: its pictures have 48 x 48 pixels and those of \S+samples 32 x 32, expected one size"),
        (one, samples, r"one: holds 1 picture\(s\), expected at least 2"),
        (samples, one, r"one: holds 1 picture\(s\), expected at least 2"),
        (samples, tmp_path / "empty", "empty: holds no images"),
        (samples / "000000.png", samples, "is no folder, expected a folder of images or an .npz"),
    ):
        for batch in (1, 64):
            with pytest.raises(UserError, match=message):
                evaluate(given, reference, tmp_path / "out.json", batch=batch, **options)
    with pytest.raises(UserError, match="expected more than 3 for precision and recall"):
        evaluate(_noise(tmp_path / "three", 32, 32, 32), samples, tmp_path / "o.json", precision_recall=True, **options)
    with pytest.raises(UserError, match="48 x 48 pixels"):
        save_statistics(mixed, tmp_path / "out.npz", **options)
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "out.npz").exists()
    prepared = evaluate(samples, mixed, tmp_path / "out.json", preparation="published", size=32, **options)
    assert prepared["reference_samples"] == 3


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A small DINOv2 of transformers for 224 pixels with random weights, and its file."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=224, patch_size=14)
    model = Dinov2Model(config).eval()
    with torch.no_grad():  # at initial values the class token hardly depends on the picture
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    path = tmp_path_factory.mktemp("dino") / "dino.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_fdd_is_torch_fidelitys_with_the_dinov2_of_transformers(parts, dino, tmp_path, capsys):
    """torch-fidelity's own extractor, which prepares the pictures, around the network of another library."""
    root, *_ = parts
    model, path = dino

    class ClassToken(torch.nn.Module):
        def forward(self, images):
            return model(images).last_hidden_state[:, 0]

    class Theirs(FeatureExtractorDinoV2):
        def __init__(self, name, features_list, **_):
            FeatureExtractorBase.__init__(self, name, features_list)
            self.feature_extractor_internal_dtype, self.model = torch.float32, ClassToken()

    FEATURE_EXTRACTORS_REGISTRY["theirs"] = Theirs
    given = {"input1": str(root / "few"), "input2": str(root / "others"), "feature_extractor": "theirs"}
    try:
        direct = torch_fidelity.calculate_metrics(
            **given, fid=True, cuda=False, cache=False, verbose=False, save_cpu_ram=True
        )
    finally:
        del FEATURE_EXTRACTORS_REGISTRY["theirs"]
    few = (root / "few", root / "others")
    result = evaluate(*few, tmp_path / "out.json", dinov2_weights=path, features=root / "judge.safetensors")
    assert result["fdd"] == pytest.approx(direct["frechet_inception_distance"], rel=1e-4) and result["fdd"] > 0.1
    assert result["fid"] == evaluate(*few, tmp_path / "b.json", features=root / "judge.safetensors")["fid"]
    assert f"FDD-30 {result['fdd']:.4f} (30 samples against 40 pictures" in capsys.readouterr().out
    alone = evaluate(*few, tmp_path / "c.json", dinov2_weights=path)
    assert alone["fdd"] == result["fdd"] and "fid" not in alone and "inception_score" not in alone

    save_statistics(root / "others", tmp_path / "s.npz", dinov2_weights=path, reference_name="The others")
    saved = evaluate(root / "few", tmp_path / "s.npz", tmp_path / "d.json", dinov2_weights=path)
    assert saved["fdd"] == pytest.approx(result["fdd"], abs=1e-6) and saved["reference_name"] == "The others"
    assert f"against saved statistics of The others ({tmp_path / 's.npz'})" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"s\.npz: holds statistics of dinov2-\S+, expected feature-network-"):
        evaluate(root / "few", tmp_path / "s.npz", tmp_path / "e.json", features=root / "judge.safetensors")


def test_what_fdd_refuses_is_one_sentence(parts, dino, tmp_path):
    root, *_ = parts
    judge, few, out = root / "judge.safetensors", (root / "few", root / "others"), tmp_path / "out.json"
    with pytest.raises(UserError, match=r"DINOv2 weights: \S+nowhere.pth does not exist, expected a local copy of"):
        evaluate(*few, out, dinov2_weights=tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="expected a vision transformer"):
        evaluate(*few, out, dinov2_weights=judge)
    with pytest.raises(UserError, match="precision_recall is given alone, expected inception_weights or features"):
        evaluate(*few, out, dinov2_weights=dino[1], precision_recall=True)
    with pytest.raises(UserError, match="expected one network for statistics"):
        save_statistics(root / "others", tmp_path / "s.npz", dinov2_weights=dino[1], features=judge)
    assert not list(tmp_path.iterdir())


def test_every_output_says_what_was_compared(parts, tmp_path, capsys):
    root, *_ = parts
    options = {"features": root / "judge.safetensors", "reference_name": "real digits"}
    result = evaluate(root / "one", root / "two", tmp_path / "out.json", **options)
    assert (result["fid_label"], result["reference_name"]) == ("FID-300", "real digits")
    assert (
        f"FID-300 {result['fid']:.4f} (300 samples against 600 pictures of real digits ({root / 'two'}); feature"
        in (capsys.readouterr().out)
    )
    assert [fidelity._label("FID", count) for count in (10_000, 12_345, 49_000, 50_000)] == [
        *("FID-10k", "FID-12345", "FID-49k", "FID")
    ]
    card = model_card("a/b", small_spec("nar"), {}, "mit", result)
    assert "| FID-300 |" in card and "300 pictures against real digits, features: feature network" in card
