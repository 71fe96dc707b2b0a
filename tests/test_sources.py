"""Sources of images: the same pictures give the same names, features and shards, whatever they are kept in."""

import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from calls import extract_features, tokenize_images
from preparation_parts import (
    REPOSITORY,
    command,
    contents,
    make_codebook,
    make_encoder,
    make_images,
    make_vqgan,
    options,
)

from digit_ds.data.images import UnreadableImageError, decode, walk
from digit_ds.data.sources.opening import open_source
from digit_ds.errors import UserError
from digit_ds.evaluation.pictures import open_pictures
from digit_ds.generation.sources import ImageFolder

CLASSES = ["n01440764", "n01443537", "n01484850"]
KINDS = ["parquet", "webdataset", "tar-of-tars", "zip", "kaggle", "val-tar"]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_parquet(
    path: Path, rows: list[tuple[bytes | None, str | None, int]], compression: str = "snappy", **more: list
) -> None:
    image = pa.array(
        [{"bytes": data, "path": name} for data, name, _ in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, "label": [label for *_, label in rows], **more})
    pq.write_table(table, path, row_group_size=7, compression=compression)


def pack(
    root: Path, images: Path, compression: tuple[str, str] = ("none", "snappy")
) -> dict[str, tuple[Path, Path | None]]:
    """The pictures of a folder in every other form, in another order: path and file of labels of each."""
    names = sorted(walk(images), key=lambda name: name[::-1])
    data = {name: (images / name).read_bytes() for name in names}
    label = {name: CLASSES.index(name.split("/")[0]) for name in names}
    made: dict[str, tuple[Path, Path | None]] = {}
    for kind in ("parquet/data", "webdataset", "kaggle/val"):
        (root / kind).mkdir(parents=True)
    half = len(names) // 2
    for part, chosen in enumerate((names[:half], names[half:])):
        rows = [(data[name], name.split("/")[1], label[name]) for name in chosen]
        file = root / f"parquet/data/train-{part:05d}-of-00002.parquet"
        write_parquet(file, rows, compression[part], caption=["a picture"] * len(rows))
        with tarfile.open(root / f"webdataset/set-{part:04d}.tar", "w") as tar:
            for name in chosen:
                add(tar, f"{name.rpartition('.')[0]}.cls", str(label[name]).encode())
                add(tar, name, data[name])
    features = [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": {"class_label": {"names": CLASSES}}}]
    card = json.dumps({"dataset_info": {"features": features}})
    (root / "parquet/README.md").write_text(f"---\n{card}\n---\n# A set\n")
    made |= {"parquet": (root / "parquet", None), "webdataset": (root / "webdataset", None)}
    with tarfile.open(root / "tar-of-tars.tar", "w") as outer:
        for folder in reversed(CLASSES):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as inner:
                for name in names:
                    if name.startswith(folder):
                        add(inner, name.split("/")[1], data[name])
            add(outer, f"{folder}.tar", packed.getvalue())
    made["tar-of-tars"] = (root / "tar-of-tars.tar", None)
    with zipfile.ZipFile(root / "set.zip", "w", zipfile.ZIP_STORED) as archive:
        for number, name in enumerate(names):
            archive.writestr(name, data[name], zipfile.ZIP_DEFLATED if number % 2 else None)
        archive.writestr("dataset.json", json.dumps({"labels": [[name, label[name]] for name in names]}))
    made["zip"] = (root / "set.zip", None)
    with (root / "LOC_val_solution.csv").open("w", newline="") as stream, tarfile.open(root / "val.tar", "w") as tar:
        table = csv.writer(stream)
        table.writerow(["ImageId", "PredictionString"])
        for name in names:
            folder, file = name.split("/")
            table.writerow([file.split(".")[0], f"{folder} 1 2 3 4 "])
            (root / "kaggle/val" / file).write_bytes(data[name])
            add(tar, file, data[name])
    made |= {"kaggle": (root / "kaggle/val", root / "LOC_val_solution.csv")}
    return made | {"val-tar": (root / "val.tar", root / "LOC_val_solution.csv")}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    root = tmp_path_factory.mktemp("sources")
    images = make_images(root / "folder", 300, tuple(CLASSES))
    encoder = make_encoder(root / "encoder.pth")
    vqgan, config = make_vqgan(root / "vqgan.ckpt")
    model = {"encoder": encoder, "num_heads": 2}
    return {
        "images": images,
        "packed": pack(root / "packed", images),
        "model": model,
        "tokens": model | {"codebook": make_codebook(root / "km.npy", encoder), "vqgan": vqgan, "vqgan_config": config},
        "expected": {},
    }


def results(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name != "images.index"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_shards_are_those_of_the_folder(parts: dict, kind: str, tmp_path: Path) -> None:
    expected = parts["expected"]
    if not expected:
        for name, make, more in (("f", extract_features, parts["model"]), ("t", tokenize_images, parts["tokens"])):
            make(parts["images"], out=tmp_path / name, workers=0, block_images=128, **more)
            expected[name] = results(tmp_path / name)
    path, labels = parts["packed"][kind]
    for name, make, more in (("f", extract_features, parts["model"]), ("t", tokenize_images, parts["tokens"])):
        out = tmp_path / kind / name
        make(path, out=out, workers=2, block_images=128, labels=labels, **more)
        found = results(out)
        assert found.keys() == expected[name].keys()
        assert [key for key in found if found[key] != expected[name][key]] == []
    if kind != "kaggle":
        index = tmp_path / kind / "f" / "images.index"
        before = index.stat().st_mtime_ns
        extract_features(path, out=index.parent, workers=0, block_images=128, labels=labels, **parts["model"])
        assert index.stat().st_mtime_ns == before  # built once


def test_pictures_to_score_and_to_start_from(parts: dict) -> None:
    import torch

    folder = open_pictures(parts["images"], "published", 32)
    for kind in ("parquet", "webdataset", "tar-of-tars", "zip"):
        pictures = open_pictures(parts["packed"][kind][0], "published", 32)
        assert pictures.content_hash == folder.content_hash
        assert torch.equal(pictures[7], folder[7])
        given = ImageFolder(parts["packed"][kind][0], 32, 32, lambda pixels: pixels.flatten(1), torch.device("cpu"))
        assert given.folders() == [name.split("/")[0] for name in folder.files]
    path, labels = parts["packed"]["kaggle"]
    given = ImageFolder(path, 32, 32, lambda pixels: pixels.flatten(1), torch.device("cpu"), labels)
    assert given.folders() == [name.split("/")[0] for name in folder.files]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_member_is_skipped_by_name(parts: dict, kind: str, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 6, tuple(CLASSES))
    broken = images / CLASSES[0] / "000.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    path, labels = pack(tmp_path / "packed", images)[kind]
    source = open_source(path, tmp_path / "index", labels)
    names = list(source.names(Counter()))
    assert names == list(walk(images))
    for name in names:
        if name == f"{CLASSES[0]}/000.jpg":
            with pytest.raises(UnreadableImageError, match="truncated"):
                decode(source.read(name))
        else:
            assert source.read(name) == (images / name).read_bytes()


def refusal(path: Path, tmp_path: Path, labels: Path | None = None) -> str:
    with pytest.raises(UserError) as refused:
        list(open_source(path, tmp_path / "index", labels).names(Counter()))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "index").exists()
    return str(refused.value)


def test_archives_that_cannot_be_used_are_refused_in_one_line(parts: dict, tmp_path: Path) -> None:
    for kind, size in (("tar-of-tars", 30_000), ("tar-of-tars", 100_123), ("val-tar", 51_200), ("zip", 20_000)):
        path = parts["packed"][kind][0]
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(path.read_bytes()[:size])
        assert refusal(cut, tmp_path).startswith(f"{cut}: ")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(next((parts["packed"]["parquet"][0] / "data").iterdir()).read_bytes()[:5000])
    assert "expected a complete parquet file" in refusal(cut, tmp_path)
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), tmp_path / "other.parquet")
    assert "has the columns picture, label, expected image" in refusal(tmp_path / "other.parquet", tmp_path)
    pixels = next(parts["images"].rglob("*.jpg")).read_bytes()
    for name, words in (("../../x.jpg", "relative path"), ("/etc/x.jpg", "relative path"), ("a//b.jpg", "relative")):
        with tarfile.open(tmp_path / "bad.tar", "w") as tar:
            add(tar, name, pixels)
        assert words in refusal(tmp_path / "bad.tar", tmp_path)
    with tarfile.open(tmp_path / "bad.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "caf\xe9.jpg", pixels)
    assert "UTF-8" in refusal(tmp_path / "bad.tar", tmp_path)
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "a/x.jpg", pixels)
        add(tar, "a/x.jpg", pixels)
    assert "a second image 'a/x.jpg'" in refusal(tmp_path / "bad.tar", tmp_path)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a/x.jpg", pixels)
    assert "expected an uncompressed tar" in refusal(tmp_path / "packed.tar", tmp_path)
    (tmp_path / "splits").mkdir()
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"splits/{split}-00000-of-00001.parquet", [(pixels, "x.jpg", 0)])
    assert "holds the splits train and validation" in refusal(tmp_path / "splits", tmp_path)
    assert list(open_source(tmp_path / "splits/train-*.parquet", tmp_path / "i").names(Counter())) == ["0/x.jpg"]
    labels = tmp_path / "labels.csv"
    labels.write_text("ImageId,PredictionString\nother,n01440764 1 2 3 4\n")
    assert "has no class for" in refusal(parts["packed"]["val-tar"][0], tmp_path, labels)
    labels.write_text("name;class\n")
    with pytest.raises(UserError, match=r"has no class for|is not a file of labels"):
        list(open_source(parts["packed"]["val-tar"][0], tmp_path / "index", labels).names(Counter()))


def test_index_follows_its_archive(parts: dict, tmp_path: Path) -> None:
    pixels = next(parts["images"].rglob("*.jpg")).read_bytes()
    for names in (["a/x.jpg"], ["b/x.jpg", "b/y.jpg"]):
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for name in names:
                add(tar, name, pixels)
        source = open_source(tmp_path / "set.tar", tmp_path / "index")
        assert list(source.names(Counter())) == names
    (tmp_path / "index").write_bytes(b"damaged" * 1000)
    assert list(open_source(tmp_path / "set.tar", tmp_path / "index").names(Counter())) == names


def open_and_die(archive: Path) -> Path:
    """The folder of the index of a process that is killed."""
    code = (
        "import os, sys; from collections import Counter; from digit_ds.data.sources import opening, passing_index\n"
        "make = passing_index.passing_index\n"
        "opening.passing_index = lambda: print(path := make(), flush=True) or path\n"
        "list(opening.open_source(sys.argv[1]).names(Counter())), os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, archive], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return Path(ended.stdout.strip()).parent


def test_index_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a/x.jpg", b"pixels")
    open_source(tmp_path / "set.zip")
    [live] = tmp_path.glob("digit_ds-index-*")
    left, young = open_and_die(tmp_path / "set.zip"), open_and_die(tmp_path / "set.zip")
    for folder in (left, live):
        os.utime(folder, (0, 0))
    last = open_and_die(tmp_path / "set.zip")
    # The young one could be of a process that has yet to lock it.
    assert {*tmp_path.glob("digit_ds-index-*")} == {live, young, last}


def test_archives_are_read_where_the_temporary_folder_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", refuse)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a/x.jpg", b"pixels")
    first = open_source(tmp_path / "set.zip")
    [folder] = tmp_path.glob("digit_ds-index-*")
    os.utime(folder, (0, 0))
    for source in (first, open_source(tmp_path / "set.zip")):
        assert list(source.names(Counter())) == ["a/x.jpg"] and source.read("a/x.jpg") == b"pixels"
    assert folder.is_dir()


def test_numeric_labels_keep_their_order_and_rows_without_names_get_one(parts: dict, tmp_path: Path) -> None:
    pixels = next(parts["images"].rglob("*.jpg")).read_bytes()
    write_parquet(tmp_path / "set.parquet", [(pixels, None, label) for label in (10, 2, 0)])
    source = open_source(tmp_path / "set.parquet", tmp_path / "index")
    assert list(source.names(Counter())) == ["0/set-0000002", "10/set-0000000", "2/set-0000001"]
    assert source.classes == [str(label) for label in range(11)]


def test_class_order_numeric(parts: dict, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    images = make_images(tmp_path / "images", 4, ("2", "10"))
    more = parts["tokens"] | {"workers": 0}
    tokenize_images(images, out=tmp_path / "text", **more)
    assert "label 0 is class '10'; --class-order numeric changes it" in capfd.readouterr().err
    tokenize_images(images, out=tmp_path / "number", class_order="numeric", **more)
    assert json.loads((tmp_path / "text/manifest.json").read_text())["classes"] == ["10", "2"]
    assert json.loads((tmp_path / "number/manifest.json").read_text())["classes"] == ["2", "10"]
    with pytest.raises(UserError, match="class_order"):
        tokenize_images(images, out=tmp_path / "number", **more)
    with pytest.raises(UserError, match="is not a number"):
        tokenize_images(parts["images"], out=tmp_path / "names", class_order="numeric", **more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_job_goes_on_with_another_number_of_processes(parts: dict, kind: str, tmp_path: Path) -> None:
    path, labels = parts["packed"][kind]
    more = {} if labels is None else {"labels": labels}
    values = options(images=path, out=tmp_path / "out", workers=1, block_images=16, batch=16, **parts["model"], **more)
    tool = [sys.executable, str(REPOSITORY / "tools/extract_features.py"), *values]
    running = subprocess.Popen(tool, env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("chunk-*.json")) and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = command("extract_features", *values, processes=2)
    assert done.returncode == 0, done.stderr
    extract_features(parts["images"], out=tmp_path / "whole", workers=1, block_images=16, batch=16, **parts["model"])
    assert results(tmp_path / "out") == results(tmp_path / "whole")


@pytest.mark.parametrize("packed", [True, False])
def test_imagenets_devkit_names_the_classes_of_the_validation_tar(parts: dict, packed: bool, tmp_path: Path) -> None:
    """The n-th line of the ground truth is the ILSVRC number of validation image n, which is no position in a list."""
    from scipy.io import savemat

    kit = tmp_path / "ILSVRC2012_devkit_t12"
    (kit / "data").mkdir(parents=True)
    numbers = {"n02119789": 1, "n02100735": 2, "n01440764": 449}  # as in the real one, in which label 0 is number 449
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    synsets = np.array([(number, wnid, "a, b", 0.0) for wnid, number in numbers.items()], dtype=kinds)
    savemat(kit / "data/meta.mat", {"synsets": synsets.reshape(-1, 1)})
    truth = [449, 1, 1, 2]
    (kit / "data/ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in truth))
    pixels = next(parts["images"].rglob("*.jpg")).read_bytes()
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (3, 1, 4, 2):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", pixels)
    labels = kit
    if packed:
        labels = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
        with tarfile.open(labels, "w:gz") as tar:
            tar.add(kit, kit.name)
    source = open_source(tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "index", labels)
    folder = {number: wnid for wnid, number in numbers.items()}
    expected = [f"{folder[number]}/ILSVRC2012_val_{at:08d}.JPEG" for at, number in enumerate(truth, 1)]
    assert list(source.names(Counter())) == sorted(expected)
    (kit / "data/meta.mat").write_bytes(b"no matrix")
    with pytest.raises(UserError, match=r"ILSVRC2012_devkit_t12: cannot be read .*, expected ImageNet's devkit"):
        open_source(tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "index", kit)


def test_uncompressed_images_of_parquet_are_read_by_offset(parts: dict, tmp_path: Path) -> None:
    names = list(walk(parts["images"]))[:40]
    rows = [((parts["images"] / name).read_bytes(), name.split("/")[1], 0) for name in names]
    for number, images in enumerate((rows, [*rows[:5], rows[0], *rows[5:]])):  # a second one lies in the dictionary
        path = tmp_path / f"{number}.parquet"
        write_parquet(path, [(data, None, label) for data, _, label in images], "none")
        source = open_source(path, tmp_path / "index")
        found = list(source.names(Counter()))
        assert [source.read(name) for name in sorted(found)] == [data for data, *_ in images]
        packed = [name for name in found if source._index.place(name).offset < 0]  # type: ignore[attr-defined]
        assert len(packed) == (7 if number else 0)
