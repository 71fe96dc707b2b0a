"""The offline jobs with several processes, killed and started again: always the same bytes."""

import random
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from calls import extract_features, tokenize_images
from PIL import Image
from preparation_parts import (
    call,
    command,
    contents,
    make_codebook,
    make_encoder,
    make_images,
    make_vqgan,
    options,
    run_ranks,
    start_ranks,
)

from digit_ds.clustering.points import open_points
from digit_ds.data.images import Crops, decode, uniforms, walk
from digit_ds.data.shards import write_block
from digit_ds.errors import UserError, run_command
from digit_ds.files import read_json, sha256
from digit_ds.preparation import features, loading, tokens
from digit_ds.preparation.verify import verify_shards
from digit_ds.tokenizer.encoder import load_encoder

IMAGES = 45


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict:
    """Both jobs as functions of the output directory."""
    root = tmp_path_factory.mktemp("jobs")
    images = make_images(root / "images", IMAGES)
    broken = images / "dog" / "001.png"
    broken.write_bytes(broken.read_bytes()[:-100])
    encoder = make_encoder(root / "encoder.pth")
    codebook = make_codebook(root / "km.npy", encoder)
    vqgan, config = make_vqgan(root / "vqgan.ckpt")
    features_job = partial(extract_features, images, encoder, num_heads=2, block_images=4, batch=3, workers=1)
    tokens_job = partial(
        tokenize_images,
        images,
        encoder,
        codebook,
        vqgan,
        vqgan_config=config,
        num_heads=2,
        views=2,
        block_images=4,
        batch=6,
        workers=1,
    )
    return {
        "features": lambda out: features_job(out, points=7),
        "tokens": lambda out: tokens_job(out=out),
        "images": images,
        "encoder": encoder,
    }


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What one uninterrupted process writes."""
    root = tmp_path_factory.mktemp("whole")
    for name in ("features", "tokens"):
        jobs[name](root / name)
    return {name: contents(root / name) for name in ("features", "tokens")}


@pytest.mark.parametrize("name", ["features", "tokens"])
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(jobs, whole, tmp_path, name, world):
    run_ranks(world, lambda: jobs[name](tmp_path / "out"))
    assert contents(tmp_path / "out") == whole[name]


@pytest.mark.fault(
    "kill -9 of any rank at any moment",
    stage="features, tokens",
    outcome="the same call continues; the files are byte-equal to those of an unbroken job",
    status="-",
    lost="nothing but unfinished blocks, which are done again",
)
@pytest.mark.parametrize("name", ["features", "tokens"])
def test_killed_at_random_moments_on_any_rank(jobs, whole, tmp_path, name, monkeypatch):
    draw = random.Random(name)
    # Slow writing, so that many of the moments lie within it.
    monkeypatch.setattr(tokens, "write_block", lambda out, samples, names: write_block(out, _slowly(samples), names))
    monkeypatch.setattr(features, "sha256", lambda path: next(_slowly([sha256(path)])))
    out, interrupted = tmp_path / "out", 0
    for world in (2, 1, 3, 2):
        before = _finished(out)
        enough = before + draw.randrange(3)
        processes = start_ranks(world, lambda: jobs[name](out))
        while _finished(out) < enough and any(process.is_alive() for process in processes):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        draw.shuffle(processes)
        for process in processes:  # the first one is killed, then the launcher kills the others
            process.kill()
            process.join()
        interrupted += not (out / "manifest.json").exists()
    assert interrupted >= 2
    run_ranks(2, lambda: jobs[name](out))
    assert contents(out) == whole[name]


@pytest.mark.fault(
    "a process that loads data or writes blocks is killed",
    stage="features, tokens",
    outcome="one line; the same call continues",
    status="2",
    lost="nothing but unfinished blocks",
)
@pytest.mark.parametrize(
    "name, child, sentence",
    [
        ("features", -1, "a process that loads data ended"),
        ("tokens", -1, "a process that loads data ended"),
        ("tokens", 0, "that writes blocks ended with status -9"),
    ],
)
def test_a_killed_child_ends_the_job_with_a_sentence(jobs, whole, tmp_path, name, child, sentence, monkeypatch, capfd):
    """The first child of a rank of ``tokens`` writes blocks, the last one decodes."""
    monkeypatch.setattr(loading, "decode", lambda path: next(_slowly([decode(path)], 0.05)))
    out = tmp_path / "out"
    victim, other = start_ranks(2, lambda: run_command(lambda _: jobs[name](out), []))
    while not _finished(out):
        time.sleep(0.001)
    children = sorted(psutil.Process(victim.pid).children(), key=lambda process: process.pid)
    children[child].kill()
    victim.join(60)
    assert victim.exitcode == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0]
    other.kill()  # as a launcher does
    other.join()
    assert not (out / "manifest.json").exists()
    monkeypatch.undo()
    run_ranks(2, lambda: jobs[name](out))
    assert contents(out) == whole[name]


def test_a_second_job_on_the_same_directory_is_refused(jobs, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "sha256", lambda path: next(_slowly([sha256(path)])))
    out = tmp_path / "out"
    ranks = start_ranks(2, lambda: jobs["features"](out))
    while not (out / "catalogue.json").exists():
        time.sleep(0.001)
    with pytest.raises(UserError, match=rf"out: process {ranks[0].pid} on .* is writing there"):
        jobs["features"](out)
    for process in ranks:
        process.kill()
        process.join()
    jobs["features"](out)  # at once: whatever the killed ones left behind
    assert contents(out) == whole["features"]


def _slowly(items, seconds=0.01):
    """The items, a hundredth of a second each."""
    for item in items:
        time.sleep(seconds)
        yield item


def _finished(out: Path) -> int:
    """Blocks that are complete."""
    return sum(1 for path in out.glob("*") if path.name.startswith(("block-", "chunk-")) and path.suffix != ".npy")


def test_finished_blocks_are_not_done_again(jobs, whole, tmp_path):
    out = tmp_path / "out"
    jobs["tokens"](out)
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "block-00003")
    before = {path: path.stat().st_mtime_ns for path in out.glob("block-*/shard*")}
    jobs["tokens"](out)
    assert contents(out) == whole["tokens"]
    after = {path: path.stat().st_mtime_ns for path in out.glob("block-*/shard*")}
    assert [path.parent.name for path in after if after[path] != before.get(path)] == ["block-00003"]


@pytest.mark.parametrize("name", ["features", "tokens"])
def test_a_complete_job_is_only_read(jobs, whole, tmp_path, name, capsys):
    """It may lie on a read-only file system, and others may be reading it."""
    out = tmp_path / "out"
    jobs[name](out)
    before = {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))}
    capsys.readouterr()
    jobs[name](out)
    assert "already complete, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))} == before
    (out / ".lock").touch()  # killed after the last file was written
    jobs[name](out)
    assert contents(out) == whole[name]
    before[out] = out.stat().st_mtime_ns
    added = jobs["images"] / "cat" / "one more.png"
    Image.new("RGB", (40, 40)).save(added)
    with pytest.raises(UserError, match=r"holds 46 images that are not the 45 with which"):
        jobs[name](out)
    added.unlink()
    assert {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))} == before


def test_torchrun_and_refusal_on_all_ranks(jobs, tmp_path):
    arguments = options(images=jobs["images"], encoder=jobs["encoder"], num_heads=2, out=tmp_path / "out", workers=1)
    result = command("extract_features", *arguments, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("44 images, 1 skipped") == 1
    assert call("extract_features", *arguments, "--seed", 1) == 2


def test_refusal_ends_every_rank(jobs, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")

    def work() -> None:
        try:
            jobs["features"](tmp_path / "out")
        except UserError as error:
            print(error)
            raise SystemExit(2) from error

    processes = start_ranks(3, work)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 2, 2]
    assert capfd.readouterr().out.count("already holds other files") == 1


def test_features_are_those_of_the_kept_patches(jobs, whole, tmp_path):
    import torch

    out = tmp_path / "out"
    out.mkdir()
    for name, data in whole["features"].items():
        (out / name).write_bytes(data)
    manifest = read_json(out / "manifest.json")
    assert (manifest["count"], manifest["width"], manifest["dtype"], manifest["skipped"]) == (44 * 7, 16, "fp16", 1)
    assert manifest["provenance"]["image_size"] == 32
    for chunk in manifest["chunks"]:
        assert sha256(out / chunk["file"]) == chunk["sha256"]
        assert np.load(out / chunk["file"], mmap_mode="r").shape == (chunk["rows"], 16)
    rows = np.concatenate([np.load(out / chunk["file"]) for chunk in manifest["chunks"]])
    names = [name for name in walk(jobs["images"]) if name != "dog/001.png"]
    encoder, crops = load_encoder(jobs["encoder"], num_heads=2), Crops("random", 32, 32, 1, 0)
    for number in (0, 17, 43):
        view = torch.from_numpy(crops.cut(decode(jobs["images"] / names[number]), names[number]))
        expected = encoder(view.permute(0, 3, 1, 2).float() / 255)[0]
        kept = np.sort(np.argsort(uniforms(64, 0, names[number], "patches"), kind="stable")[:7])
        assert np.allclose(rows[7 * number : 7 * number + 7], expected[kept], atol=2e-3)


def test_bf16_features_are_the_rounded_ones_and_kmeans_reads_them(jobs, tmp_path):
    import torch

    points = {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        extract_features(jobs["images"], jobs["encoder"], out, num_heads=2, points=7, workers=0, dtype=dtype)
        points[dtype] = torch.from_numpy(open_points(out).read(0, 44 * 7))
    assert not torch.equal(points["bf16"], points["fp32"])
    assert torch.equal(points["bf16"], points["fp32"].bfloat16().float())
    half, whole = ((tmp_path / dtype / "chunk-00000.npy").stat().st_size for dtype in ("bf16", "fp32"))
    assert whole - half == 44 * 7 * 16 * 2


def test_fraction_keeps_about_that_share(jobs, tmp_path):
    extract_features(jobs["images"], jobs["encoder"], tmp_path / "out", num_heads=2, fraction=0.25, workers=0)
    assert 0.2 < read_json(tmp_path / "out" / "manifest.json")["count"] / (44 * 64) < 0.3


def test_shards_verify(jobs, whole, tmp_path):
    for name, data in whole["tokens"].items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    assert verify_shards(tmp_path).manifest.samples == 88
