"""The sampling job: files, restart, refusals, and the same pictures however it is run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import sample
from PIL import Image
from preparation_parts import make_codebook, make_encoder, make_images, make_vqgan
from small_models import CLASSES, CODES, VQ_CODES, small_spec, write_models

from digit_ds.data.images import Crops, decode, walk
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.generation.pictures import read_png
from digit_ds.generation.preview import Preview
from digit_ds.generation.settings import SampleSettings
from digit_ds.model.released import save_model
from digit_ds.model.weights import initial_state
from digit_ds.tokenizer.codebook import load_codebook
from digit_ds.tokenizer.encoder import load_encoder
from digit_ds.tokenizer.vqgan import load_vqgan


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


def run(models, out, prior="prior", pixel_decoder="ar", **settings):
    sample(
        out,
        vqgan=models["vqgan.ckpt"],
        vqgan_config=models["vqgan.yaml"],
        prior=prior and models[prior],
        pixel_decoder=pixel_decoder and models[pixel_decoder],
        **settings,
    )


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_job_writes_everything_it_promises(models, tmp_path, capsys):
    run(models, tmp_path / "out", per_class=7, seed=3, adm_array=True)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["complete"] and manifest["count"] == 21
    assert manifest["labels"] == [0, 1, 2] * 7 and manifest["classes"] == ["ant", "bee", "cat"]
    names = sorted(path.name for path in (tmp_path / "out/images").iterdir())
    assert names == [f"{image:06d}.png" for image in range(21)]
    with np.load(tmp_path / "out/tokens.npz") as tokens, np.load(tmp_path / "out/samples.npz") as adm:
        assert tokens["discriminative"].shape == tokens["vq"].shape == (21, 16)
        assert tokens["discriminative"].max() < CODES and tokens["vq"].max() < VQ_CODES
        assert tokens["label"].tolist() == manifest["labels"] == adm["arr_1"].tolist()
        assert adm["arr_0"].shape == (21, 8, 8, 3) and adm["arr_0"].dtype == np.uint8
        for image in range(21):
            assert np.array_equal(np.asarray(Image.open(tmp_path / f"out/images/{image:06d}.png")), adm["arr_0"][image])
    assert Image.open(tmp_path / "out/grid.png").size[0] > 7 * 64
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("grid.png", "images", "manifest.json", "samples.npz", "tokens.npz")
    ]
    before = content(tmp_path / "out")
    capsys.readouterr()
    run(models, tmp_path / "out", per_class=7, seed=3, adm_array=True)
    assert "complete already, 21 pictures" in capsys.readouterr().out
    assert content(tmp_path / "out") == before


def test_batch_size_changes_no_byte(models, tmp_path):
    settings = {"count": 37, "classes": [2, 0], "top_k": 9, "guidance": 2.0, "guidance_schedule": "cosine"}
    run(models, tmp_path / "a", batch=64, **settings)
    run(models, tmp_path / "b", batch=5, **settings)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    labels = json.loads((tmp_path / "a/manifest.json").read_text())["labels"]
    assert labels == ([2, 0] * 19)[:37]


COMMAND = """
import os, signal, sys, torch
from digit_ds.generation.job import SamplingJob
from digit_ds.generation.sample import sample
from digit_ds.generation.settings import SampleSettings
models, out, count, last = sys.argv[1:]
write = SamplingJob.write_block

def write_and_die(self, block, pictures, tokens):  # while other threads write and the next tokens are drawn
    write(self, block, pictures, tokens)
    if block == int(last):
        os.kill(os.getpid(), signal.SIGKILL)

SamplingJob.write_block = write_and_die
torch.set_num_threads(1)
sample(SampleSettings(out=out, vqgan=f"{models}/vqgan.ckpt", vqgan_config=f"{models}/vqgan.yaml",
                      prior=f"{models}/prior", pixel_decoder=f"{models}/nar", count=int(count), batch=16))
"""


def start(models, out: Path, count: int, processes: int, last: int = -1) -> subprocess.Popen:
    """A job of its own, killed when block ``last`` is written."""
    script = out.parent / "job.py"
    script.write_text(COMMAND)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, script, models["prior"].parent, out, str(count), str(last)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )


def test_the_number_of_processes_changes_no_byte(models, tmp_path):
    run(models, tmp_path / "alone", pixel_decoder="nar", count=90, batch=64)
    three = start(models, tmp_path / "three", 90, processes=3)
    _, errors = three.communicate(timeout=300)
    assert three.returncode == 0, errors
    assert content(tmp_path / "three") == content(tmp_path / "alone")


@pytest.mark.fault(
    "kill -9 of any rank at any moment",
    stage="sampling",
    outcome="the same call continues; equal pictures and tokens",
    status="-",
    lost="at most a block of pictures a process",
)
def test_a_killed_job_continues_and_refuses_other_settings(models, tmp_path):
    run(models, tmp_path / "whole", pixel_decoder="nar", count=300, batch=128)
    out = tmp_path / "killed"
    job = start(models, out, 300, processes=1, last=7)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == -signal.SIGKILL, errors
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    done = {path.stem: path.stat().st_mtime_ns for path in out.glob("images/[0-9]*.png")}
    finished = len(list(out.glob("parts/[0-9]*.npz")))
    assert 1 <= finished < 19
    (out / "images" / ".000299.12345.tmp.png").write_bytes(b"half a picture")  # killed while it was written
    with pytest.raises(UserError, match="holds a job whose count is 300, but this one's is 96"):
        run(models, out, pixel_decoder="nar", count=96)
    with pytest.raises(UserError, match="holds a job whose seed is 0, but this one's is 1"):
        run(models, out, pixel_decoder="nar", count=300, seed=1)
    run(models, out, pixel_decoder="nar", count=300, batch=64)
    assert content(out) == content(tmp_path / "whole")
    kept = [path for path in out.glob("images/*.png") if done.get(path.stem) == path.stat().st_mtime_ns]
    assert len(kept) >= finished * 16 - 16  # a block of four pictures at most is the last one


def test_given_tokens_are_reconstructed_or_completed(models, tmp_path):
    run(models, tmp_path / "drawn", prior="unconditional", count=20)
    with np.load(tmp_path / "drawn/tokens.npz") as arrays:
        drawn = dict(arrays)
    run(models, tmp_path / "again", prior=None, from_tokens=tmp_path / "drawn/tokens.npz")
    with np.load(tmp_path / "again/tokens.npz") as again:
        assert np.array_equal(again["discriminative"], drawn["discriminative"])
        assert np.array_equal(again["vq"], drawn["vq"])
    run(models, tmp_path / "half", prior="unconditional", seed=9, from_tokens=tmp_path / "drawn/tokens.npz", keep=8)
    with np.load(tmp_path / "half/tokens.npz") as half:
        assert np.array_equal(half["discriminative"][:, :8], drawn["discriminative"][:, :8])
        assert (half["discriminative"][:, 8:] != drawn["discriminative"][:, 8:]).mean() > 0.5
    config = json.loads((models["ar"] / "config.json").read_text())
    shutil.copytree(models["ar"], tmp_path / "other")
    other = {**config, "provenance": {**config["provenance"], "codebook_sha256": "f" * 64}}
    (tmp_path / "other/config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"other: belongs to codebook ffff.*tokens\.npz to codebook cccc"):
        run(
            {**models, "other": tmp_path / "other"},
            *(tmp_path / "wrong", None, "other"),
            from_tokens=tmp_path / "drawn/tokens.npz",
        )


def test_vq_baseline_paints_its_own_tokens_and_completes_pictures(models, tmp_path):
    run(models, tmp_path / "drawn", prior="vq", pixel_decoder=None, count=18)
    with np.load(tmp_path / "drawn/tokens.npz") as tokens:
        assert sorted(tokens.files) == ["label", "vq"]
    run(models, tmp_path / "half", prior="vq", pixel_decoder=None, from_images=tmp_path / "drawn/images", keep=12)
    with np.load(tmp_path / "half/tokens.npz") as half:
        assert half["vq"].shape == (18, 16)


def test_pictures_are_reconstructed_or_completed(tmp_path, monkeypatch):
    """The real tokeniser: 32-pixel images, an encoder of 8 x 8 patches, a VQGAN of 4 pixels a token."""
    images = make_images(tmp_path / "images", 9)
    encoder = make_encoder(tmp_path / "encoder.pth")
    codebook = make_codebook(tmp_path / "km.npy", encoder)
    vqgan, config = make_vqgan(tmp_path / "vqgan.ckpt")
    painter = load_vqgan(vqgan, config)
    origin = {"encoder_sha256": sha256(encoder), "layer": 3, "codebook_sha256": sha256(codebook)}
    for seed, kind in enumerate(("prior", "ar")):
        spec = replace(small_spec(kind, 0), max_positions=128, grid=(8, 8))
        spec = replace(spec, vq_codes=painter.codes if kind == "ar" else 0)
        save_model(tmp_path / kind, spec, initial_state(spec, seed), origin)
    common = {"vqgan": vqgan, "vqgan_config": config, "pixel_decoder": tmp_path / "ar"}
    common |= {"from_images": images, "encoder": encoder, "num_heads": 2, "codebook": codebook}
    sample(tmp_path / "all", **common, batch=2)
    sample(tmp_path / "half", **common, prior=tmp_path / "prior", keep=32)
    crops = Crops("training", 32, 32, 1, 0)
    expected = []
    for name in walk(images):
        pixels = torch.from_numpy(crops.cut(decode(images / name), name)).permute(0, 3, 1, 2).float() / 255
        expected.append(load_codebook(codebook).assign(load_encoder(encoder, num_heads=2)(pixels))[0].numpy())
    manifest = json.loads((tmp_path / "all/manifest.json").read_text())
    assert sorted(set(manifest["labels"])) == [0, 1, 2] and len(manifest["classes"]) == 3
    with np.load(tmp_path / "all/tokens.npz") as whole, np.load(tmp_path / "half/tokens.npz") as half:
        assert np.array_equal(whole["discriminative"], expected)
        assert np.array_equal(half["discriminative"][:, :32], np.stack(expected)[:, :32])
        assert not np.array_equal(half["discriminative"], whole["discriminative"])
    name = next(iter(walk(images)))
    check_grids(tmp_path / "all", tmp_path / "half", crops.cut(decode(images / name), name)[0])
    other = make_codebook(tmp_path / "other.npy", encoder, width=16, codes=30)
    with pytest.raises(UserError, match=r"belongs to codebook .*, but codebook .*other\.npy to"):
        sample(tmp_path / "new", **{**common, "codebook": other})
    (images / "cat/broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png: is not a readable image"):
        sample(tmp_path / "broken", **common)


def check_grids(whole, half, original):
    """The first column: the picture as given, its upper half with the rest in grey, and what became of it."""
    grids = [np.asarray(Image.open(job / "grid.png").convert("RGB")) for job in (whole, half)]
    left = grids[0].shape[1] - 3 * 66, grids[1].shape[1] - 3 * 66  # three pictures a class, enlarged to 64, gaps of 2
    first = [[grid[2 + 66 * row :, x:][:64:2, :64:2] for row in range(3)] for grid, x in zip(grids, left)]
    results = [read_png(job / "images" / "000000.png") for job in (whole, half)]
    assert np.array_equal(first[0][0], original) and np.array_equal(first[0][1], results[0])
    assert np.array_equal(first[1][0], original) and np.array_equal(first[1][2], results[1])
    assert np.array_equal(first[1][1][:16], original[:16]) and np.ptp(first[1][1][16:]) == 0


def test_preview_of_a_model_in_training(models, tmp_path):
    painter = {"vqgan": models["vqgan.ckpt"], "vqgan_config": models["vqgan.yaml"]}
    with_nar = Preview(partner=models["nar"], **painter)
    grid = with_nar.grid(models["prior"], 3, 4)
    assert torch.equal(grid, Preview(partner=models["prior"], **painter).grid(models["nar"], 3, 4))
    assert grid.dtype == torch.uint8 and grid.shape[0] == 3 and grid.shape[2] > 4 * 64
    assert Preview(**painter).grid(models["vq"]).shape[0] == 3
    with pytest.raises(UserError, match="cannot be previewed"):
        Preview(**painter).grid(models["prior"])
    # The pictures of a score are those that a sampling job of that many draws.
    run(models, tmp_path / "job", pixel_decoder="nar", count=21, batch=21, precision="float32")
    drawn = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "job/images").iterdir())])
    assert np.array_equal(with_nar.pictures(models["prior"], 21), drawn)


def test_pixels_that_are_not_finite_are_no_picture(models, tmp_path):
    state = torch.load(models["vqgan.ckpt"], weights_only=True)
    state["state_dict"]["decoder.conv_out.weight"] *= 1e6  # beyond float16's 65,504
    torch.save(state, tmp_path / "large.ckpt")
    prior = tmp_path / "vq"
    shutil.copytree(models["vq"], prior)
    config = json.loads((prior / "config.json").read_text())
    (prior / "config.json").write_text(json.dumps({**config, "provenance": {}}))
    changed = {**models, "vq": prior, "vqgan.ckpt": tmp_path / "large.ckpt"}
    run(changed, tmp_path / "float32", prior="vq", pixel_decoder=None, count=3)
    with pytest.raises(UserError, match="not finite"):
        run(changed, tmp_path / "out", prior="vq", pixel_decoder=None, count=3, vqgan_precision="float16")
    assert not list((tmp_path / "out" / "images").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": [CLASSES]}, r"class 3 is outside of .*, expected 0\.\.2"),
        ({"prior": "unconditional", "per_class": 3, "count": None}, "is unconditional"),
        ({"prior": "unconditional", "classes": [1]}, "unconditional: is unconditional, but classes are given"),
        ({"prior": "unconditional", "guidance": 2.0}, r"unconditional: is unconditional, but guidance scale is 2\.0"),
        ({"prior": "cut"}, r"cut/model\.safetensors"),
        ({"from_images": "pictures"}, r"needs the encoder's weights .*--encoder, --codebook"),
        ({"per_class": 2}, "count is 4 and per_class is 2, expected one of them"),
        ({"pixel_decoder": None}, "writes discriminative tokens, expected a pixel decoder too"),
        ({"pixel_decoder": "vq"}, "has kind vq, expected ar or nar"),
        ({"prior": "vq"}, "writes VQ tokens itself"),
        ({"prior": None}, "prior is not given, expected"),
        ({"keep": 3}, "keep is given"),
        (
            {"from_images": "pictures", "keep": 17},
            r"keep is 17, but a picture of .*prior has 16 tokens, expected 0 to 16 \(--keep\)",
        ),
        ({"labels": "val.csv"}, "val.csv: labels are given without pictures"),
        ({"batch": -1}, "batch is -1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(models, tmp_path, change, message):
    """The corrected command may name the same folder."""
    cut = tmp_path / "cut"
    shutil.copytree(models["prior"], cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-64])
    make_images(tmp_path / "pictures", 1)
    if "from_images" in change:
        change = {"keep": 3, **change, "from_images": tmp_path / change["from_images"]}
    with pytest.raises(UserError, match=message):
        run({**models, "cut": cut}, tmp_path / "out", **{"count": 4, **change})
    assert not (tmp_path / "out").exists()


def test_foreign_folder_and_foreign_parts_are_refused(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not a sampling job"):
        run(models, tmp_path / "out", count=4)
    config = json.loads((models["ar"] / "config.json").read_text())
    for key, what in (("codebook_sha256", "codebook"), ("vqgan_sha256", "VQGAN")):
        other = tmp_path / key
        other.mkdir()
        (other / "model.safetensors").symlink_to(models["ar"] / "model.safetensors")
        changed = {**config, "provenance": {**config["provenance"], key: "f" * 64}}
        (other / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"belongs to {what} .*, but .* to "):
            run({**models, "other": other}, tmp_path / "new", pixel_decoder="other", count=4)
        with pytest.raises(UserError, match=f"belongs to {what} .*, but .* to "):
            Preview(models["vqgan.ckpt"], models["vqgan.yaml"], other).grid(models["prior"], 2, 2)


def test_without_a_count_a_few_pictures_of_each_class_are_drawn(models, tmp_path):
    """As the README writes the command; a complete job gets the array that is asked for later."""
    run(models, tmp_path / "classes")
    labels = json.loads((tmp_path / "classes/manifest.json").read_text())["labels"]
    assert sorted(labels) == sorted([0, 1, 2] * 4)
    assert not (tmp_path / "classes/samples.npz").exists()
    run(models, tmp_path / "classes", adm_array=True)
    with np.load(tmp_path / "classes/samples.npz") as adm:
        assert adm["arr_1"].tolist() == labels
        assert np.array_equal(adm["arr_0"][5], np.asarray(Image.open(tmp_path / "classes/images/000005.png")))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            (name, value)
            for name in ("temperature", "guidance", "decoder_temperature")
            for value in (float("nan"), 1e308)
        ),
        *(("temperature", float("inf")), ("batch", 0), ("steps", 0), ("per_class", 0), ("keep", -1), ("top_p", 0.0)),
        *(("top_p", 1.5), ("decoder_top_p", 1.5)),
    ],
)
def test_numbers_that_cannot_be_are_refused_with_their_name(option, value):
    with pytest.raises(UserError, match=re.escape(f"{option} is {value}, expected")):
        SampleSettings.read({"out": "out", "vqgan": "v", option: value})
