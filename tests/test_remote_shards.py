"""Token shards in an object store: kills, and what a store cannot give, over a real S3-compatible server."""

import json
import multiprocessing
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import boto3
import pytest
from object_store import ENVIRONMENT, Store
from training_parts import launch, start, write_shards

from digit_ds.data import cached, s3
from digit_ds.data.order import KeyedOrder
from digit_ds.data.shards import iterate, read_index, read_manifest
from digit_ds.data.stream import Chunks, TokenStream
from digit_ds.errors import UserError, run_command

IMAGES, VIEWS, BATCH = 96, 2, 8


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[tuple[Store, Path]]:
    """A bucket with a set of small shards, and the same on disk."""
    local = write_shards(tmp_path_factory.mktemp("tokens") / "local", images=IMAGES, views=VIEWS, blocks=8)
    server = Store()
    with pytest.MonkeyPatch.context() as patch:
        server.set_environment(patch)
        server.upload(local, "tokens", "set")
        yield server, local
    server.stop()
    s3._clients.clear()


def read(shards: str, out: Path, patience: float) -> None:
    """Global batches of an epoch on this rank, from the first that no rank has noted as a resumed run begins."""
    from digit_ds.parallel.launch import barrier, initialize, rank, world_size

    cached.PATIENCE = patience
    multiprocessing.set_start_method("fork", force=True)  # as a training has it
    initialize(timedelta(seconds=60))
    barrier()
    noted = [len(path.read_text().splitlines()) for path in out.glob("rank*.jsonl")]
    barrier()
    stream = TokenStream(shards, str(out / "cache"), seed=5, owner=str(out / "run"))
    first = min(noted) if len(noted) == world_size() else 0
    batches = stream.batches(Chunks(BATCH, BATCH // 2, rank(), 2), first * BATCH, workers=1)
    path = out / f"rank{rank()}.jsonl"
    lines = path.read_text().splitlines()[:first] if path.exists() else []
    for _ in range(first, IMAGES // BATCH):
        lines.append(json.dumps(next(batches).samples.tolist()))
        path.write_text("".join(line + "\n" for line in lines))
        barrier()  # as the steps of a training: no rank is ahead of the others
    stream.close()


def read_as_a_command(*arguments) -> None:
    from digit_ds.parallel.workers import worker_errors_in_one_line

    def command(_arguments: list[str]) -> None:
        with worker_errors_in_one_line():
            read(*arguments)

    run_command(command, [])


def expected(local: Path) -> list[int]:
    """Samples of the epoch in order."""
    images, views = KeyedOrder(IMAGES, VIEWS, 5).places(range(IMAGES))
    return (images * VIEWS + views).tolist()


def found(out: Path) -> list[int]:
    """Samples that both ranks noted, in the order of the global batches."""
    ranks = [[json.loads(line) for line in (out / f"rank{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    return [sample for turn in zip(*ranks, strict=True) for part in turn for sample in part]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.fault(
    "killed while the index or a shard is fetched from an object store",
    stage="training",
    outcome="the same call goes on in the same order; a half file is not used",
    status="-",
    lost="steps since the last checkpoint",
)
def test_killed_at_any_moment_goes_on_in_the_same_order(store, tmp_path):
    server, local = store
    arguments, cache = ("s3://tokens/set/", tmp_path, 0.0), tmp_path / "cache"

    def killed(reached: Callable[[], bool]) -> None:
        group = start(read, arguments, 2, tmp_path / "log")
        try:
            wait_for(reached)
        finally:
            group.kill()
        group.wait()

    for part in ("index.json", ".mds"):
        server.hold(part)
        killed(server.reached.is_set)
        server.let_go()
    killed(lambda: (tmp_path / "rank0.jsonl").exists() and len((tmp_path / "rank0.jsonl").read_text()) > 100)
    assert len((tmp_path / "rank0.jsonl").read_text().splitlines()) < IMAGES // BATCH
    # What a kill leaves in the middle of writing, by this version and by an earlier one; and a machine that went down.
    raw = sorted((cache / "block-00000").parent.rglob("*.mds"))[0]
    for name in (f".{raw.stem}.77.tmp.mds", f"{raw.name}.zstd", f"{raw.name}.zstd.5F3aB1cD", f"{raw.name}.tmp"):
        raw.with_name(name).write_bytes(b"half")
    raw.write_bytes(raw.read_bytes()[:-1])
    launch(read, arguments, 2, tmp_path / "log")
    assert found(tmp_path) == expected(local)
    sizes = {shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in read_index(local)}
    held = {str(path.relative_to(cache)): path.stat().st_size for path in cache.rglob("*.*") if path.is_file()}
    assert {name: size for name, size in held.items() if "block" in name} == sizes
    assert (cache / "index.json").read_bytes() == (local / "index.json").read_bytes()


def test_a_store_that_comes_back_is_waited_for(store, tmp_path):
    server, local = store
    server.hold("block-0000")
    group = start(read, ("s3://tokens/set", tmp_path, 60.0), 2, tmp_path / "log")
    try:
        wait_for(server.reached.is_set)
        server.stop()
        server.let_go()
        wait_for(lambda: "is asked again for 60 seconds" in group.output())
        server.start()
        assert group.wait(60) == [0, 0], group.output()
    finally:
        group.kill()
    assert found(tmp_path) == expected(local)


@pytest.mark.fault(
    "a remote shard is missing, or its store stays away",
    stage="training",
    outcome="one line that names the shard; an absent store is asked for five minutes first",
    status="2",
    lost="steps since the last checkpoint",
)
@pytest.mark.parametrize("dead", [False, True])
def test_a_shard_that_cannot_be_had_ends_every_rank(store, dead, tmp_path):
    server, local = store
    key = "set/" + read_index(local)[5]["zip_data"]["basename"]
    line = rf"s3://tokens/{key}: cannot be read \(there is no such object in bucket 'tokens': NoSuchKey\), expected a "
    if dead:
        line = r"s3://tokens/set/block-\S+: cannot be read \(.*\), expected an object store that .* asked for 1 sec"
        server.hold("block-0000")
    else:
        server.client().delete_object(Bucket="tokens", Key=key)
    group = start(read_as_a_command, ("s3://tokens/set", tmp_path, 1.0), 2, tmp_path / "log")
    try:
        if dead:
            wait_for(server.reached.is_set)
            server.stop()
            server.let_go()
        statuses = group.wait(60)
    finally:
        group.kill()
        if dead:
            server.start()
        server.client().upload_file(str(local / key.removeprefix("set/")), "tokens", key)
    errors = [found for found in group.output().splitlines() if found.startswith("error: ")]
    assert any(re.match(f"error: {line}", found) for found in errors), group.output()
    assert 2 in statuses and set(statuses) <= {1, 2} and "Traceback" not in group.output(), group.output()


@pytest.mark.fault(
    "a remote shard is cut short or altered",
    stage="training",
    outcome="refused by its size or hash before it enters the cache, with one line that names it",
    status="2",
    lost="steps since the last checkpoint",
)
def test_an_altered_shard_stays_out_of_the_cache(store, tmp_path):
    server, local = store
    key = "set/" + read_index(local)[0]["zip_data"]["basename"]
    whole = (local / key.removeprefix("set/")).read_bytes()
    stream = TokenStream("s3://tokens/set", str(tmp_path / "cache"), owner=str(tmp_path / "run"), order="none")
    for body, words in (
        (whole[:-3], rf"has {len(whole) - 3} bytes, expected {len(whole)} by index\.json"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), r"is damaged, its sha256 is not the \w{12}\.\.\. of index\.json"),
        (whole, r"is damaged, its sha256 is not the \w{12}\.\.\. of index\.json"),  # by the process that met it
    ):
        server.client().put_object(Bucket="tokens", Key=key, Body=body)
        with pytest.raises(UserError, match=rf"^s3://tokens/{key}: {words}$"):
            next(stream.epoch(8, 0, 1))
        assert not list((tmp_path / "cache").rglob("block*/*"))
        if len(body) < len(whole):
            stream.dataset.dataset._shard_states[0] = 1  # as another start finds it
    stream.close()


def test_every_process_says_why_a_shard_cannot_be_had(store, tmp_path):
    server, local = store
    key = "set/" + read_index(local)[0]["zip_data"]["basename"]
    server.client().delete_object(Bucket="tokens", Key=key)
    cache, line = tmp_path / "cache", rf"^s3://tokens/{key}: cannot be read \(there is no such object .*$"
    stream = TokenStream("s3://tokens/set", str(cache), owner=str(tmp_path / "run"), order="none")
    try:
        with pytest.raises(UserError, match=line) as first:
            next(stream.epoch(8, 0, 1))
        shards = stream.dataset.dataset
        states, lock = shards._shard_states, shards._cache_filelock
        states[0] = 1  # remote, as another start finds it

        class Late:
            """Another process fails between this one's first look at the state and its lock."""

            def acquire(self):
                lock.acquire()
                states[0] = cached._FAILED

            def release(self):
                lock.release()

        shards._cache_filelock = Late()
        with pytest.raises(UserError) as second:
            next(stream.epoch(8, 0, 1))
        assert str(second.value) == str(first.value)
        assert [path.name for path in cache.rglob(".failed-*")]
    finally:
        server.client().upload_file(str(local / key.removeprefix("set/")), "tokens", key)
        stream.close()
    again = TokenStream("s3://tokens/set", str(cache), owner=str(tmp_path / "run"), order="none")
    assert not list(cache.rglob(".failed-*"))
    assert next(again.epoch(8, 0, 1)).samples.tolist() == [2 * image for image in range(8)]
    again.close()


def test_a_set_that_is_not_there_ends_every_rank_with_one_line(store, tmp_path):
    group = start(read_as_a_command, ("s3://nobody/set", tmp_path, 1.0), 2, tmp_path / "log")
    assert group.wait(60) == [2, 2]
    (line,) = (line for line in group.output().splitlines() if line)
    assert line.startswith("error: s3://nobody/set/manifest.json: cannot be read (there is no bucket 'nobody'")


@pytest.mark.fault(
    "an object store refuses, does not answer or does not hold the set",
    stage="training",
    outcome="refused with one line that names the address and what was found",
    status="2",
    lost="nothing",
)
def test_what_a_store_refuses(store, monkeypatch, tmp_path):
    server, local = store

    def refusal(address: str = "s3://tokens/set", **environment: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value) if value else patch.delenv(name)
            s3._clients.clear()
            with pytest.raises(UserError) as refused:
                TokenStream(address, str(tmp_path / "cache"), owner=str(tmp_path / "run"))
        s3._clients.clear()
        assert "\n" not in str(refused.value) and "None" not in str(refused.value)
        return str(refused.value)

    assert read_manifest("s3://tokens/set/") == read_manifest(local)
    manifest, content = "s3://tokens/set/manifest.json: cannot be read", "a complete directory of token shards"
    assert refusal("s3://nobody/set") == (
        "s3://nobody/set/manifest.json: cannot be read (there is no bucket 'nobody': NoSuchBucket), "
        f"expected the name of a bucket of {server.address}"
    )
    assert refusal("s3://tokens/other") == (
        "s3://tokens/other/manifest.json: cannot be read (there is no such object in bucket 'tokens': NoSuchKey), "
        f"expected {content}"
    )
    assert (
        refusal("s3://") == f"s3:///manifest.json: is not an address of {content}, expected a path or s3://BUCKET/KEY"
    )
    assert refusal("s4://tokens/set").startswith(
        "s4://tokens/set/manifest.json: cannot be read (Unsupported remote path"
    )
    client = server.client()
    client.delete_object(Bucket="tokens", Key="set/index.json")
    assert refusal().startswith(
        "s3://tokens/set/index.json: cannot be read (there is no such object in bucket 'tokens'"
    )
    client.put_object(Bucket="tokens", Key="set/index.json", Body=b"{}")
    assert refusal().startswith("s3://tokens/set: index.json is not the one that manifest.json names (SHA-256 ")
    client.upload_file(str(local / "index.json"), "tokens", "set/index.json")
    assert refusal(S3_ENDPOINT_URL="store:9000") == (
        "environment variable S3_ENDPOINT_URL is 'store:9000', expected http://HOST:PORT or https://HOST"
    )
    nothing = refusal(S3_ENDPOINT_URL="http://127.0.0.1:1")
    assert nothing.startswith(f"{manifest} (") and '"http://127.0.0.1:1/tokens/set/manifest.json"' in nothing
    assert nothing.endswith("), expected an object store that answers; S3_ENDPOINT_URL names another than Amazon's")
    nobody = refusal(
        AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="", HOME=str(tmp_path), AWS_EC2_METADATA_DISABLED="true"
    )
    known = "expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws, that the store knows"
    assert nobody == f"{manifest} (Unable to locate credentials), {known}"

    iam = boto3.client("iam", endpoint_url=server.address)
    iam.create_user(UserName="guest")
    key = iam.create_access_key(UserName="guest")["AccessKey"]
    require_rights(server, "0")
    try:
        assert refusal() == f"{manifest} (the store refuses access key testing: InvalidAccessKeyId), {known}"
        guest = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        assert refusal(**guest) == (
            f"{manifest} (access is denied to access key {key['AccessKeyId']}: AccessDenied), expected rights to list "
            "bucket 'tokens' and to get its objects"
        )
        wrong = refusal(**guest | {"AWS_SECRET_ACCESS_KEY": "wrong"})
        assert (
            wrong == f"{manifest} (the store refuses access key {key['AccessKeyId']}: SignatureDoesNotMatch), {known}"
        )
    finally:
        require_rights(server, "inf")
    assert len(list(iterate(local))) == IMAGES * VIEWS and ENVIRONMENT.items() <= os.environ.items()


def require_rights(server: Store, after: str) -> None:
    """Have the store check credentials and policies after so many requests."""
    address, kind = f"{server.address}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    request = urllib.request.Request(address, after.encode(), kind, method="POST")
    urllib.request.urlopen(request).close()
