"""Archives in an object store, over a real S3-compatible server on the loopback address."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from preparation_parts import REPOSITORY, make_encoder, make_images, options
from test_sources import CLASSES, pack, results

from digit_ds.data import s3
from digit_ds.data.sources.opening import open_source
from digit_ds.errors import UserError
from digit_ds.evaluation.pictures import open_pictures


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[dict]:
    """A bucket with every kind of archive, and the folder that was packed."""
    root = tmp_path_factory.mktemp("remote")
    images = make_images(root / "images", 60, tuple(CLASSES))
    packed = pack(root / "packed", images)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in (
        ("S3_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        patch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.create_bucket(Bucket="sets")
    for path in sorted((root / "packed").rglob("*")):
        if path.suffix in (".parquet", ".tar", ".zip"):
            client.upload_file(str(path), "sets", f"in/{path.relative_to(root / 'packed')}")
    yield {"images": images, "packed": packed, "root": root, "client": client}
    server.stop()
    patch.undo()
    s3._clients.clear()


ADDRESSES = {
    "parquet": "s3://sets/in/parquet/data/train-*.parquet",
    "webdataset": "s3://sets/in/webdataset/",
    "tar-of-tars": "s3://sets/in/tar-of-tars.tar",
    "zip": "s3://sets/in/set.zip",
    "val-tar": "s3://sets/in/val.tar",
}


@pytest.mark.parametrize("kind", ADDRESSES)
def test_every_archive_is_that_of_the_file_system(store, kind, tmp_path):
    path, labels = store["packed"][kind]
    here, there = (
        open_source(place, tmp_path / name, labels) for place, name in ((path, "here"), (ADDRESSES[kind], "there"))
    )
    names = list(there.names(Counter()))
    if kind == "parquet":  # the card, which names the classes, lies beside the local files
        assert [name.split("/")[1] for name in sorted(names)] == [name.split("/")[1] for name in here.names(Counter())]
        return
    assert names == list(here.names(Counter())) and len(names) == 60
    assert there.classes == here.classes
    assert all(there.read(name) == here.read(name) for name in names)


def test_features_by_processes_that_load_are_those_of_the_folder(store, tmp_path):
    encoder = make_encoder(tmp_path / "encoder.pth")
    for name, images in (("folder", store["images"]), ("remote", ADDRESSES["tar-of-tars"])):
        values = options(images=images, out=tmp_path / name, encoder=encoder, num_heads=2, workers=2, block_images=16)
        tool = [sys.executable, str(REPOSITORY / "tools/extract_features.py"), *values]
        subprocess.run(tool, env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, check=True)
    assert results(tmp_path / "remote") == results(tmp_path / "folder")


def test_pictures_to_score_may_be_remote(store):
    assert len(open_pictures(ADDRESSES["zip"], "center-crop", 32)) == 60


def test_what_a_store_cannot_give_is_one_line(store, tmp_path, monkeypatch):
    for address, words in (
        ("s3://sets/nowhere/*.tar", "holds 0 objects, none of them"),
        ("s3://nobody/in/set.zip", "nobody/in/set.zip: cannot be read .there is no bucket 'nobody': NoSuchBucket"),
        ("gs://sets/in/set.zip", "is not an address of images, expected a path or s3://BUCKET/KEY"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            open_source(address, tmp_path / "index")
        assert "\n" not in str(refused.value)
    body = Path(store["packed"]["zip"][0]).read_bytes()
    store["client"].put_object(Bucket="sets", Key="cut/set.zip", Body=body[:20_000])
    with pytest.raises(UserError, match="expected a complete zip"):
        list(open_source("s3://sets/cut/set.zip", tmp_path / "index").names(Counter()))
    source = open_source(ADDRESSES["zip"], tmp_path / "index")
    names = list(source.names(Counter()))
    store["client"].delete_object(Bucket="sets", Key="in/set.zip")
    with pytest.raises(UserError, match=r"set\.zip: cannot be read \(there is no such object in bucket 'sets'"):
        source.read(names[0])  # no image is skipped for it
    store["client"].put_object(Bucket="sets", Key="in/set.zip", Body=body)
