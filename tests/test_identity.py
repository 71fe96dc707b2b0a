"""Artefacts that do not belong together are refused, and a cache never outlives its content."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import export, sample
from PIL import Image
from small_models import small_spec, write_models
from training_parts import metrics, recipe, train, write_shards
from training_parts import start as start_ranks

from digit_ds.clustering.seeding import centroids_from_file
from digit_ds.data import cache as caches
from digit_ds.data import shards as shard_files
from digit_ds.data.stream import Chunks, TokenStream
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json
from digit_ds.generation.labels import choose_labels
from digit_ds.generation.sources import ImageFolder
from digit_ds.identity import Part, check_agreement, check_classes
from digit_ds.preparation.census import Census
from digit_ds.training.runs import check_shards


def rewrite(directory: Path, change: Callable[[dict], None]) -> Path:
    """Change every sample of a shard set and write its index and manifest again."""
    blocks = ("block-00000", "block-00001")
    for block in blocks:
        samples = []
        for shard in read_json(directory / block / "index.json")["shards"]:
            for part in (shard["raw_data"], shard["zip_data"]):
                part["basename"] = f"{block}/{part['basename']}"
            samples += shard_files.read_shard(directory, shard)
        shutil.rmtree(directory / block)
        for one in samples:
            change(one)
        shard_files.write_block(directory / block, samples, shard_files.COLUMNS)
    change_manifest(directory, index_sha256=shard_files.merge_blocks(directory, blocks))
    return directory


def other_shards(directory: Path) -> Path:
    """Shards as ``write_shards`` makes them, of other codes and another number of images."""

    def shift(one: dict) -> None:
        one["discriminative"] = ((one["discriminative"] + 7) % 8).astype(np.uint16)

    return rewrite(write_shards(directory, images=24), shift)


def change_manifest(directory: Path, **values) -> None:
    path = directory / "manifest.json"
    write_json(path, read_json(path) | values)


def change_provenance(directory: Path, **values) -> None:
    known = read_json(directory / "manifest.json")["provenance"]
    change_manifest(directory, provenance=known | values)


def codes_of(shards: Path, cache: Path | None, owner: Path) -> set[int]:
    stream = TokenStream(str(shards), str(cache) if cache else None, owner=str(owner))
    seen: set[int] = set()
    batches = stream.batches(Chunks(8, 8))
    for _ in range(-(-stream.manifest.images // 8)):
        seen |= set(next(batches).discriminative.flatten().tolist())
    del batches, stream.dataset
    stream.close()
    return seen


@pytest.mark.fault(
    "shards made again under the same path",
    stage="training",
    outcome="the cache is named by content: the new shards are read",
    status="-",
    lost="nothing",
)
def test_a_default_cache_is_of_one_content_and_goes_with_its_run(tmp_path, monkeypatch):
    """Shards made again under the same path, trained on under the same name: everyone's loop."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    first = codes_of(write_shards(tmp_path / "shards"), None, tmp_path / "run" / "train")
    shutil.rmtree(tmp_path / "shards")
    second = codes_of(other_shards(tmp_path / "shards"), None, tmp_path / "run" / "train")
    assert max(first) > 8 > max(second)
    assert not list((tmp_path / "tmp").glob("digit_ds-cache-*"))


@pytest.mark.fault(
    "data.cache holds other shards, or was killed while being emptied",
    stage="training",
    outcome="it is emptied and filled anew",
    status="-",
    lost="nothing",
)
def test_a_named_cache_is_emptied_for_other_shards(tmp_path):
    before, after = write_shards(tmp_path / "before"), other_shards(tmp_path / "after")
    cache = tmp_path / "cache"
    assert max(codes_of(before, cache, tmp_path / "a")) > 8
    assert max(codes_of(after, cache, tmp_path / "a")) < 8
    stamp = read_json(cache / caches.STAMP)
    assert stamp["index_sha256"] == read_json(after / "manifest.json")["index_sha256"]
    # Killed while it was being emptied: what is left belongs to neither.
    write_json(cache / caches.STAMP, stamp | {"ready": False})
    (cache / "block-00000" / "shard.00000.mds").write_bytes(b"left over")
    assert max(codes_of(after, cache, tmp_path / "a")) < 8


def test_a_cache_of_an_older_version_is_adopted_or_refused(tmp_path):
    before, after = write_shards(tmp_path / "before"), other_shards(tmp_path / "after")
    codes_of(before, tmp_path / "cache", tmp_path / "a")
    (tmp_path / "cache" / caches.STAMP).unlink()
    assert max(codes_of(before, tmp_path / "cache", tmp_path / "a")) > 8
    (tmp_path / "cache" / caches.STAMP).unlink()
    with pytest.raises(UserError, match=r"cache: holds files that are not a cache of these shards"):
        codes_of(after, tmp_path / "cache", tmp_path / "a")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("kept")
    with pytest.raises(UserError, match="home: holds files that are not a cache"):
        codes_of(after, tmp_path / "home", tmp_path / "a")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "kept"


def test_a_cache_whose_job_was_killed_a_moment_ago(tmp_path):
    """Its loading processes share the lock and outlive it by about a second."""
    held = caches.prepare(tmp_path / "cache", "a" * 64, "job")
    with subprocess.Popen(["sleep", "1"], stdin=held):  # the same open file, as a forked process has it
        held.close()
        caches.prepare(tmp_path / "cache", "a" * 64, "job").close()


def test_a_cache_in_use_and_a_cache_without_an_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    held = caches.prepare(tmp_path / "cache", "a" * 64, "job")
    monkeypatch.setattr(caches, "RELEASE_SECONDS", 0.3)
    with pytest.raises(UserError, match="cache of another job that runs on this node"):
        caches.prepare(tmp_path / "cache", "b" * 64, "other job")
    held.close()
    (tmp_path / "alive").mkdir()
    gone, alive, live = (
        caches.default_cache(text * 64, str(tmp_path / run / "train"))
        for text, run in (("a", "gone"), ("a", "alive"), ("b", "gone"))
    )
    for path, run in ((gone, "gone"), (alive, "alive")):
        caches.prepare(path, "a" * 64, str(tmp_path / run / "train")).close()
    in_use = caches.prepare(live, "b" * 64, str(tmp_path / "gone" / "train"))
    caches.remove_orphans(str(tmp_path / "new" / "train"), keep=tmp_path / "none")
    assert (gone.exists(), alive.exists(), live.exists()) == (False, True, True)
    in_use.close()


def test_an_index_that_the_manifest_does_not_name_is_refused(tmp_path):
    shards = write_shards(tmp_path / "shards")
    change_manifest(shards, index_sha256="0" * 64)
    with pytest.raises(UserError, match=r"shards: index.json is not the one that manifest.json names"):
        codes_of(shards, None, tmp_path / "a")


@pytest.mark.fault(
    "validation shards of another codebook or with other classes",
    stage="training",
    outcome="refused at the start",
    status="2",
    lost="nothing",
)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"codebook_sha256": "0" * 64},
            "belongs to codebook k .codebook_sha256., but shards .*val to codebook 000",
        ),
        ({"layer": 1}, "belongs to encoder layer 3 .layer., but shards .*val to encoder layer 1;"),
        ({"classes": ["class0", "class2", "class1"]}, "label 1 is class 'class1', but 'class2' in shards .*val"),
        ({"classes": ["class0", "class1"]}, "has 3 classes, but shards .*val has 2"),
        ({"discriminative_codes": 28}, "discriminative_codes is 27, but shards .*val has 28"),
    ],
)
def test_validation_shards_must_mean_the_same(tmp_path, change, words):
    training, validation = write_shards(tmp_path / "train"), write_shards(tmp_path / "val")
    values = recipe(tmp_path / "run", training, data__validation=str(validation))
    read = shard_files.read_manifest
    check_shards(values, read(training), read(validation))
    provenance = {name: value for name, value in change.items() if name not in ("classes", "discriminative_codes")}
    change_provenance(validation, **provenance)
    change_manifest(validation, **{name: value for name, value in change.items() if name not in provenance})
    with pytest.raises(UserError, match=words):
        check_shards(values, read(training), read(validation))


def test_a_model_knows_its_classes_shards_and_class_dropout(tmp_path):
    shards = write_shards(tmp_path / "shards")
    values = recipe(tmp_path / "run", shards, training__steps=2, training__class_dropout=0.0)
    group = start_ranks(train, (values,), 1, tmp_path / "log")
    assert group.wait() == [0], group.output()
    export(tmp_path / "run", tmp_path / "model")
    provenance = read_json(tmp_path / "model" / "config.json")["provenance"]
    assert provenance["classes"] == ["class0", "class1", "class2"]
    assert provenance["shards_sha256"] == read_json(shards / "manifest.json")["index_sha256"]
    assert provenance["class_dropout"] == 0.0


@pytest.mark.fault(
    "a sample without a label in class-conditional training",
    stage="training",
    outcome="one line that names the image",
    status="2",
    lost="steps since the last checkpoint",
)
def test_a_sample_without_a_label_ends_a_class_conditional_training_by_name(tmp_path):
    def take_label(one: dict) -> None:
        one["label"] = -1 if one["index"] == 5 else one["label"]

    shards = rewrite(write_shards(tmp_path / "shards", images=16), take_label)
    group = start_ranks(train, (recipe(tmp_path / "run", shards),), 1, tmp_path / "log")
    assert group.wait() != [0]
    assert "image class2/0005.png has label -1, but a class-conditional model expects one of 0..2" in group.output()
    assert len(metrics(tmp_path / "run")) <= 2  # an epoch is two steps


class TestClasses:
    """Pictures and numbers find their label by the model's names, never by their own order."""

    spec = small_spec("prior", 3)
    names = {"classes": ["10", "2", "symbols"]}  # noqa: RUF012

    def folder(self, root: Path, *names: str) -> ImageFolder:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(root / name)
        return ImageFolder(root, 8, 8, lambda images: images, torch.device("cpu"))

    def choose(self, source, classes=None, provenance=None, **options):
        provenance = self.names if provenance is None else provenance
        return choose_labels("model", self.spec, provenance, source, options.get("count"), None, classes)

    def test_folders_are_matched_by_name(self, tmp_path):
        source = self.folder(tmp_path, "symbols/a.png", "2/b.png")
        labels, names = self.choose(source)
        assert dict(zip(source.names, labels)) == {"2/b.png": 1, "symbols/a.png": 2}
        assert names == ["10", "2", "symbols"]

    def test_unknown_folders_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"the class of 7/a.png is unknown .folder '7'., expected the name of a"):
            self.choose(self.folder(tmp_path, "2/b.png", "7/a.png"))
        with pytest.raises(UserError, match=r"the class of a.png is unknown .no folder."):
            self.choose(self.folder(tmp_path / "flat", "a.png"))

    def test_classes_say_it_where_no_name_does(self, tmp_path):
        source = self.folder(tmp_path, "a/1.png", "b/2.png")
        assert self.choose(source, ["symbols"])[0] == [2, 2]
        assert self.choose(source, ["symbols", "0"])[0] == [2, 0]
        assert self.choose(source, [1], provenance={})[0] == [1, 1]
        with pytest.raises(UserError, match="3 classes are given for pictures in 2 folders"):
            self.choose(source, [0, 1, 2])
        with pytest.raises(UserError, match="expected --classes"):
            self.choose(source, provenance={})

    def test_names_are_drawn_as_labels_are(self):
        assert self.choose(None, ["symbols", "1"], count=3)[0] == [2, 1, 2]
        message = "class 'goldfish' is unknown to model, expected a label 0..2 or a name of 3 classes; names: 10, 2"
        with pytest.raises(UserError, match=message):
            self.choose(None, ["goldfish"], count=1)


def test_guidance_without_class_dropout_is_refused(tmp_path):
    models = write_models(tmp_path / "models")
    config = models["prior"] / "config.json"
    known = read_json(config)
    options = {"prior": models["prior"], "pixel_decoder": models["ar"], "count": 3}
    options |= {"vqgan": models["vqgan.ckpt"], "vqgan_config": models["vqgan.yaml"]}
    write_json(config, {**known, "provenance": {**known["provenance"], "class_dropout": 0.0}})
    with pytest.raises(UserError, match=r"guidance scale is 2.0, but the model was trained with training.cla"):
        sample(tmp_path / "out", guidance=2.0, **options)
    assert not (tmp_path / "out").exists()
    for index, provenance in enumerate(({"class_dropout": 0.1}, {})):  # {}: not recorded in published models
        write_json(config, {**known, "provenance": {**known["provenance"], **provenance}})
        sample(tmp_path / f"out{index}", guidance=2.0, **options)
        assert (tmp_path / f"out{index}" / "manifest.json").is_file()


def test_parts_that_differ_are_named():
    two, four = ({"architecture": f"x heads {heads}"} for heads in (2, 4))
    with pytest.raises(UserError, match=r"a: belongs to encoder architecture x heads 2 .*, but c to .* heads 4; they"):
        check_agreement([Part("a", two), Part("b", {}), Part("c", four)])
    check_classes([Part("a", {"classes": ["x"]}), Part("b", {}), Part("c", {"classes": ["x"]})])


def test_a_wrong_folder_is_seen_before_the_work_starts(tmp_path):
    def census(*names: str) -> Census:
        counted = Census()
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            counted.count(name)
        return counted

    numbers = census("2/a.png", "10/b.png", "10/c.png")
    (tmp_path / "3").mkdir()
    assert numbers.classes == ["10", "2"]
    assert numbers.summary(tmp_path, ["10", "2"]) == f"{tmp_path}: 3 images, 2 classes of 1 to 2 images: 10, 2"
    empty, order = numbers.warnings(tmp_path, ["10", "2"], True)
    assert "1 folders without images are not classes and have no label: 3" in empty
    assert "label 0 is class '10'" in order
    shutil.rmtree(tmp_path / "3")
    splits = census("train/a.png", "val/b.png")
    assert any(
        "folders train and val are taken for classes" in text
        for text in splits.warnings(tmp_path, ["train", "val"], True)
    )
    numbers.check(tmp_path)
    census("a.png", "b.png").check(tmp_path)  # an unlabelled set
    with pytest.raises(UserError, match=r"stray.png: lies in no class folder .1 such images., but .* has 1 class"):
        census("2/a.png", "stray.png").check(tmp_path)


def test_a_kill_before_the_stamp_and_a_cache_named_like_a_default_one(tmp_path):
    """The lock comes first: a job killed right after it leaves nothing but the lock."""
    shards, cache = write_shards(tmp_path / "shards"), tmp_path / "digit_ds-cache-mine"
    caches.prepare(cache, "a" * 64, "job").close()
    (cache / caches.STAMP).unlink()
    assert [path.name.startswith(".lock-") for path in cache.iterdir()] == [True]
    assert max(codes_of(shards, cache, tmp_path / "a")) > 8
    assert (cache / "index.json").is_file()  # a cache that the user named stays


def test_a_kill_while_a_default_cache_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    shards, owner = write_shards(tmp_path / "shards"), tmp_path / "run" / "train"
    left = caches.default_cache(shard_files.read_manifest(shards).index_sha256, str(owner))
    (left / "block-00000").mkdir(parents=True)
    (left / "block-00000" / "shard.00000.mds").write_bytes(b"half")  # the stamp and the index went first
    assert max(codes_of(shards, None, owner)) > 8
    assert not left.exists()


def test_initial_centroids_of_another_encoder_are_refused(tmp_path):
    np.save(tmp_path / "init.npy", np.eye(3, dtype=np.float32))
    centroids = centroids_from_file(tmp_path / "init.npy", 3, 3, {"encoder_sha256": "a" * 64})
    assert np.array_equal(centroids, np.eye(3))  # a bare file is of unknown origin
    write_json(tmp_path / "init.json", {"encoder_sha256": "b" * 64})
    with pytest.raises(UserError, match=r"init.npy: belongs to encoder bbbbbbbbbbbb .*, but features to encoder"):
        centroids_from_file(tmp_path / "init.npy", 3, 3, {"encoder_sha256": "a" * 64})
