"""Image folder -> token shards, by the commands that users type."""

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import tokenize_images
from PIL import Image
from preparation_parts import (
    SIZE,
    call,
    command,
    contents,
    make_codebook,
    make_encoder,
    make_images,
    make_vqgan,
    options,
)

from digit_ds.data.images import Crops, decode, walk
from digit_ds.data.shards import COLUMNS, iterate, merge_blocks, read_manifest, write_block
from digit_ds.errors import UserError
from digit_ds.preparation import verify
from digit_ds.preparation.recheck import recheck
from digit_ds.preparation.verify import verify_shards
from digit_ds.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("parts")
    encoder = make_encoder(root / "encoder.pth")
    vqgan, config = make_vqgan(root / "vqgan.ckpt")
    return {
        "images": make_images(root / "images"),
        "encoder": encoder,
        "codebook": make_codebook(root / "km.npy", encoder),
        "vqgan": vqgan,
        "vqgan_config": config,
        "num_heads": 2,
    }


def run(parts: dict, out: Path, **options) -> None:
    tokenize_images(**({"views": 2, "block_images": 8, "batch": 6, "workers": 0} | parts | {"out": out} | options))


@pytest.fixture(scope="module")
def shards(parts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    run(parts, out)
    return out


def test_the_samples_are_the_tokens_of_the_views(parts, shards):
    names = list(walk(parts["images"]))
    samples = list(iterate(shards))
    assert [(s["image_id"], s["view"]) for s in samples] == [(name, view) for name in names for view in range(2)]
    assert [s["index"] for s in samples] == [i for i in range(len(names)) for _ in range(2)]
    classes = sorted({name.split("/")[0] for name in names})
    assert [s["label"] for s in samples] == [classes.index(s["image_id"].split("/")[0]) for s in samples]
    tokenizer = Tokenizer(**{k: v for k, v in parts.items() if k != "images"})
    crops = Crops("training", SIZE, SIZE, 2, 0)
    for position in (0, 7, 19):
        views = crops.cut(decode(parts["images"] / names[position]), names[position])
        expected = tokenizer.encode(torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255)
        for view in range(2):
            sample = samples[2 * position + view]
            assert sample["discriminative"].dtype == sample["vq"].dtype == np.uint16
            assert sample["discriminative"].tolist() == expected[0][view].tolist()
            assert sample["vq"].tolist() == expected[1][view].tolist()


def test_manifest_and_verification(parts, shards):
    manifest = read_manifest(shards)
    assert (manifest.images, manifest.views, manifest.grid, manifest.image_size) == (20, 2, [8, 8], SIZE)
    assert (manifest.discriminative_codes, manifest.vq_codes, manifest.skipped) == (24, 32, 0)
    assert set(manifest.provenance) >= {"encoder_sha256", "layer", "transform", "codebook_sha256", "vqgan_sha256"}
    report = verify_shards(shards)
    counts = Counter(int(code) for sample in iterate(shards) for code in sample["discriminative"])
    assert report.usage["discriminative"].counts.tolist() == [counts[code] for code in range(24)]
    assert report.usage["discriminative"].used == len(counts)
    shares = np.array(list(counts.values())) / sum(counts.values())
    assert report.usage["discriminative"].perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_streaming_dataset_reads_the_merged_index(shards, tmp_path):
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        remote=str(shards), local=str(tmp_path / "cache"), shuffle=False, batch_size=1, validate_hash="sha256"
    )
    streamed = [dataset[i] for i in range(len(dataset))]
    for ours, theirs in zip(iterate(shards), streamed, strict=True):
        assert ours["image_id"] == theirs["image_id"] and ours["view"] == theirs["view"]
        assert np.array_equal(ours["vq"], theirs["vq"])


def test_second_run_does_nothing_and_other_settings_are_refused(parts, shards, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    before = contents(out)
    run(parts, out)
    assert "already complete" in capsys.readouterr().out
    for changed in ({"views": 1}, {"seed": 1}, {"vqgan": None}, {"precision": "bf16"}):
        with pytest.raises(UserError, match="already holds the results of another run"):
            run(parts, out, **changed)
    assert contents(out) == before
    other = make_images(tmp_path / "images", 5)
    with pytest.raises(UserError, match="not the 20"):
        run(parts, out, images=other)
    assert contents(out) == before


def test_occupied_directory_is_refused(parts, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already holds other files"):
        run(parts, tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_flipped_bytes_are_found(shards, tmp_path, capsys):
    names = [name for name in contents(shards) if name.endswith((".zstd", "index.json")) and "/index" not in name]
    assert len(names) == 4
    for name in names:
        out = tmp_path / name.replace("/", "-")
        shutil.copytree(shards, out)
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data)
        assert call("verify_shards", out) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ") and str(out / name) in message


def test_missing_shard_is_found(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "out")
    (tmp_path / "out" / "block-00001" / "shard.00000.mds.zstd").unlink()
    with pytest.raises(UserError, match=r"block-00001/shard\.00000\.mds\.zstd"):
        verify_shards(tmp_path / "out")


def killed(*_arguments) -> None:
    """Exit as a process that the out-of-memory killer kills."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault(
    "a reading process is killed",
    stage="verify",
    outcome="one line",
    status="2",
    lost="nothing",
)
def test_a_killed_reader_does_not_hang_the_verification(shards, monkeypatch):
    monkeypatch.setattr(verify, "_check_shard", killed)
    with pytest.raises(UserError, match="a process that read its shards was killed"):
        verify_shards(shards, workers=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"discriminative": 24}, "discriminative code 24, expected 0 to 23"),
        ({"vq": 32}, "vq code 32, expected 0 to 31"),
        ({"label": 3}, "labels -?[01] to 3, expected -1 to 2"),
        ({"view": 0}, "view 0 stands where view 1 of image"),
        ({"index": 999}, "image 999 view 1 stands where view 1 of image"),
        (None, "holds 38 samples, expected 40"),
    ],
)
def test_wrong_samples_with_right_hashes_are_found(shards, tmp_path, change, message):
    """Shards as a faulty writer would leave them: the second view of each block's last image is wrong or missing."""
    blocks = sorted(path.name for path in shards.glob("block-*"))
    samples = list(iterate(shards))
    for block in blocks:
        mine = [dict(s) for s in samples if f"block-{s['index'] // 8:05d}" == block]
        if change is None:
            mine = mine[:-2] if block == blocks[0] else mine
        for name, value in (change or {}).items():
            old = mine[-1][name]
            mine[-1][name] = np.full_like(old, value) if isinstance(old, np.ndarray) else value
        write_block(tmp_path / "out" / block, mine, COLUMNS)
    digest = merge_blocks(tmp_path / "out", blocks)
    replace(read_manifest(shards), index_sha256=digest).write(tmp_path / "out")
    for workers in (1, 2):
        with pytest.raises(UserError, match=message):
            verify_shards(tmp_path / "out", workers)


def test_what_does_not_belong_together_is_refused(parts, tmp_path):
    other = make_encoder(tmp_path / "other.pth", seed=9)
    coarse, config = make_vqgan(tmp_path / "coarse.ckpt", levels=4)
    wide = make_codebook(tmp_path / "wide.npy", width=17)
    for changed, message in (
        ({"encoder": other}, r"km\.npy.*encoder_sha256.*other\.pth"),
        ({"layer": 2}, r"km\.npy.*layer 3.*layer 2"),
        ({"codebook": wide}, r"wide\.npy.*width 17.*16"),
        ({"vqgan": coarse, "vqgan_config": config}, r"coarse\.ckpt.*4 x 4.*8 x 8"),
        ({"image_size": 30}, r"^image_size is 30 pixels, expected 32 for this encoder$"),
    ):
        with pytest.raises(UserError, match=message):
            run(parts, tmp_path / "out", **changed)
        assert not (tmp_path / "out").exists()


def test_bad_folders(parts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for images in (tmp_path / "nowhere", tmp_path / "empty"):
        assert call("tokenize_images", *options(**parts | {"images": images, "out": tmp_path / "out"})) == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("error: ") and len(message.splitlines()) == 1 and str(images) in message
        assert not (tmp_path / "out").exists()


@pytest.mark.fault(
    "an image is truncated or no image",
    stage="features, tokens",
    outcome="skipped and listed in skipped.json; more than --max-skipped: one line",
    status="0; 2 beyond",
    lost="that image",
)
def test_truncated_image_is_skipped_and_reported(parts, tmp_path, capsys):
    images = make_images(tmp_path / "images", 12)
    victim = images / "dog" / "001.png"
    victim.write_bytes(victim.read_bytes()[:-200])
    Image.new("RGB", (40, 40)).save(images / "cat" / "zz.png")
    arguments = options(**parts | {"images": images, "out": tmp_path / "out"})
    assert call("tokenize_images", *arguments, "--max-skipped", 0.05) == 2
    assert "1 of 13 images" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    # As a user types it, in a process of its own.
    result = command("tokenize_images", *arguments)
    assert result.returncode == 0, result.stderr
    assert "1 skipped" in result.stdout
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["image"] for entry in skipped] == ["dog/001.png"] and "truncated" in skipped[0]["reason"]
    assert read_manifest(tmp_path / "out").skipped == 1
    assert verify_shards(tmp_path / "out").manifest.images == 12


def test_tokenising_a_sample_again(parts, shards, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    arguments = options(**parts, sheet=sheet, sample=12)
    assert call("verify_shards", shards, *arguments) == 0
    output = capsys.readouterr().out
    assert output.count("tokenised again: 100.00% equal") == 2
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (8 * 168 + 8, 3 * 168 + 8, 3)
    tokenizer = Tokenizer(**{k: v for k, v in parts.items() if k != "images"})
    last = recheck(shards, parts["images"], tokenizer, 12).views[-1]  # the rows are spread over all samples
    assert (pixels[7 * 168 + 8 : 8 * 168 : 5, 8:168:5] == last).all()
    first = next(s for s in iterate(shards) if s["image_id"].startswith("cat"))
    assert len(np.unique(first["discriminative"])) > 1
    # Other images under the same names.
    other = make_images(tmp_path / "other", 20, seed=1)
    assert call("verify_shards", shards, *options(**parts | {"images": other}, sample=12)) == 2
    assert "of its images, expected at least 99.00%" in capsys.readouterr().err
    encoder = make_encoder(tmp_path / "other.pth", seed=9)
    codebook = make_codebook(tmp_path / "km.npy")
    changed = parts | {"encoder": encoder, "codebook": codebook}
    assert call("verify_shards", shards, *options(**changed)) == 2
    assert "was made with" in capsys.readouterr().err
    assert call("verify_shards", shards, "--sheet", sheet) == 2
    (parts["images"] / "cat").rename(tmp_path / "cat")
    try:
        assert call("verify_shards", shards, *options(**parts)) == 2
        assert "No such file" in capsys.readouterr().err
    finally:
        (tmp_path / "cat").rename(parts["images"] / "cat")


def test_views_for_the_probe(parts, tmp_path):
    plain = {key: value for key, value in parts.items() if not key.startswith("vqgan")}
    for crops, views in (("ten-crop", 10), ("random-resized-crop", 3)):
        tokenize_images(**plain, vqgan=None, out=tmp_path / crops, crops=crops, views=views, workers=0)
        report = verify_shards(tmp_path / crops)
        assert (report.manifest.views, report.manifest.crops, report.manifest.vq_codes) == (views, crops, 0)
        first = [sample["discriminative"].tolist() for sample, _ in zip(iterate(tmp_path / crops), range(views))]
        assert len(set(map(tuple, first))) > views // 2
        assert "vq" not in next(iter(iterate(tmp_path / crops)))
