"""The order of samples: bijections, windows of shards under a bounded cache, runs that began with the stored order."""

import json
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from object_store import Store
from training_parts import launch, metrics, recipe, train, write_shards

from digit_ds.config import load_recipe
from digit_ds.data.order import Bijection, InOrder, KeyedOrder, Order, StoredOrder
from digit_ds.data.stream import Chunks, TokenStream
from digit_ds.errors import UserError
from digit_ds.training.runs import settle

SIZES = (*range(1, 70), 127, 128, 129, 1000, 4095, 4097, 20_011)


def places(order: Order, positions: Sequence[int]) -> list[tuple[int, int]]:
    images, views = order.places(positions)
    return list(zip(images.tolist(), views.tolist()))


def test_a_bijection_is_one_at_every_size():
    for size in SIZES:
        bijection = Bijection(size, 7, size)
        assert np.sort(bijection(np.arange(size))).tolist() == list(range(size))
    found = Bijection(10**12, 1)(np.arange(20_000)).tolist()
    assert len(set(found)) == 20_000 and max(found) < 10**12


def test_orders_stay_those_of_earlier_versions():
    """A run that continues with another version must read the same images."""
    assert Bijection(12, 3, 1)(np.arange(12)).tolist() == [10, 9, 7, 0, 8, 5, 4, 11, 2, 6, 3, 1]
    keyed, stored = KeyedOrder(6, 2, 3), StoredOrder(6, 2, 3)
    assert places(keyed, range(8)) == [
        *((2, 1), (4, 0), (0, 0), (1, 1), (5, 1), (3, 0), (5, 0), (0, 1)),
    ]
    assert places(stored, range(8)) == [
        *((0, 0), (1, 1), (5, 1), (3, 1), (2, 0), (4, 0), (5, 0), (1, 0)),
    ]
    assert places(InOrder(3), range(4)) == [(0, 0), (1, 0), (2, 0), (0, 0)]


def test_a_keyed_order_looks_random():
    """Neighbours, fixed points and positions of many keys, as a random permutation has them."""
    size, keys = 1000, 100
    orders = np.array([Bijection(size, 5, key)(np.arange(size)) for key in range(keys)]).astype(np.int64)
    assert np.mean(orders == np.arange(size)) * size == pytest.approx(1, abs=0.3)  # fixed points of a permutation
    assert np.mean(np.diff(orders, axis=1) == 1) * size == pytest.approx(1, abs=0.3)  # successors that stay together
    assert orders.mean(0) == pytest.approx(np.full(size, (size - 1) / 2), rel=0.3)  # 5 standard errors
    bins = np.bincount((orders[:, :100] // 100).ravel(), minlength=10)
    assert ((bins - 1000) ** 2 / 1000).sum() < 40  # chi squared, 9 degrees of freedom
    correlations = np.corrcoef(orders[:40])[np.triu_indices(40, 1)]
    assert np.abs(correlations).max() < 0.16  # 5 standard errors


@pytest.mark.parametrize(("views", "window"), [(1, 1), (3, 2), (3, 4), (7, None)])
def test_windows_hold_every_image_once_and_touch_their_shards_alone(views, window):
    """Shards of unequal sizes that cut between the views of an image."""
    images, generator = 500, np.random.default_rng(0)
    cuts = sorted(generator.choice(np.arange(1, images * views), 15, replace=False).tolist())
    ends = [*cuts, images * views]
    order = KeyedOrder(images, views, 2, np.diff([0, *ends]).tolist(), window)
    seen = []
    for epoch in range(3):
        shown = places(order, range(epoch * images, (epoch + 1) * images))
        assert sorted(image for image, _ in shown) == list(range(images))
        seen.append(dict(shown))
        shards = np.searchsorted(ends, [image * views + view for image, view in shown], side="right").tolist()
        for shard in set(shards) if window else ():
            used = [at for at, other in enumerate(shards) if other == shard]
            assert len({*shards[used[0] : used[-1] + 1]}) <= window  # a shard's images lie within its window
    if views > 1:
        assert all((seen[0][image] + 1) % views == seen[1][image] for image in range(images))
    assert list(seen[0]) != list(seen[1])


def test_an_order_takes_no_memory_for_images():
    tracemalloc.start()
    order = KeyedOrder(10**9, 10, 0, [10**7] * 1000, 100)
    images, views = order.places([0, 1, 10**9 - 1, 10**9, 5 * 10**9 + 7])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6, f"{peak} bytes at a billion images in a thousand shards"
    assert images.max() < 10**9 and views.max() < 10


def test_fetches_of_a_bounded_cache():
    """Shards used by the order under a cache of a quarter of the set that forgets the least recently used."""
    images, shards = 4_000, 40
    for limit in (10, 4):
        order = KeyedOrder(images, 1, 1, [images // shards] * shards, max(1, (limit - 1) // 2))
        cache, fetches = OrderedDict(), 0
        for shard in (order.places(range(3 * images))[0] // (images // shards)).tolist():
            if shard not in cache:
                fetches += 1
                if len(cache) == limit:
                    cache.popitem(last=False)
            cache[shard] = True
            cache.move_to_end(shard)
        assert fetches / (3 * shards) <= 1.1


SHARDS, IMAGES = 20, 600


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[tuple[Store, Path]]:
    """A bucket with a set of many small shards, and the same on disk."""
    folder = tmp_path_factory.mktemp("tokens")
    local = write_shards(folder / "local", images=IMAGES, views=3, blocks=SHARDS)
    server, patch = Store(), pytest.MonkeyPatch()
    server.set_environment(patch)
    server.upload(local, "tokens", "set")
    yield server, local
    server.stop()
    patch.undo()


def read(shards: str, limit: float | None, out: Path, workers: int, position: int) -> None:
    """Samples of this rank, from ``position`` to the end of the first epoch."""
    from digit_ds.parallel.launch import barrier, initialize, rank, world_size

    if world_size() > 1:
        from datetime import timedelta

        initialize(timedelta(seconds=60))
    stream = TokenStream(shards, seed=5, owner=str(out), cache_limit=limit)
    chunks = Chunks(8, 4, rank(), world_size()) if world_size() > 1 else Chunks(8, 4)
    batches = stream.batches(chunks, position, workers)
    steps = (IMAGES - position) // 8
    found = []
    for _ in range(steps * chunks.per_step):
        found.append(next(batches).samples.tolist())
        barrier()  # as the steps of a training: no rank is ahead of the others
    (out / f"{rank()}.json").write_text(json.dumps(found))
    stream.close()


@pytest.mark.parametrize(("world", "workers", "position"), [(2, 2, 88)])
def test_an_epoch_fetches_each_shard_about_once(store, world, workers, position, tmp_path):
    server, local = store
    sizes = [path.stat().st_size for path in local.rglob("*.mds*")]
    assert len(sizes) == SHARDS
    index = json.loads((local / "index.json").read_text())["shards"]
    largest = max(part["raw_data"]["bytes"] + part["zip_data"]["bytes"] for part in index)
    limit = ((local / "index.json").stat().st_size + len(sizes) / 4 * largest) / 2**30
    server.gets.clear()
    launch(read, ("s3://tokens/set", limit, tmp_path, workers, position), world, tmp_path / "log")
    fetched = {path: count for path, count in server.gets.items() if ".mds" in path}
    assert len(fetched) >= len(sizes) - position // 30
    assert sum(fetched.values()) / len(sizes) <= 1.1, fetched
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    together = [sample for turn in zip(*found) for batch in turn for sample in batch]
    order = KeyedOrder(
        IMAGES, 3, 5, [part["samples"] for part in index], window=2
    )  # half of what a quarter of them leaves
    images, views = order.places(range(position, IMAGES))
    assert together == (images * 3 + views).tolist()


def test_a_limit_that_is_too_low_is_refused(store, tmp_path):
    with pytest.raises(
        AssertionError, match=r"data\.cache_limit is 1,073 bytes, expected at least the index of s3://tokens"
    ):
        launch(read, ("s3://tokens/set", 1e-6, tmp_path, 0, 0), 1, tmp_path / "log")
    _, local = store
    shards = json.loads((local / "index.json").read_text())["shards"]
    three = 3 * max(shard["raw_data"]["bytes"] + shard["zip_data"]["bytes"] for shard in shards)
    limit = ((local / "index.json").stat().st_size + three) / 2**30  # StreamingDataset would open it
    with pytest.raises(AssertionError, match=r"data\.cache_limit is .* and four of its largest shards"):
        launch(read, (str(local), limit, tmp_path, 0, 0), 1, tmp_path / "three")


def test_a_run_goes_on_with_the_order_that_it_began_with(tmp_path):
    """One that was begun before there was a choice has no key in its recipe."""
    shards = write_shards(tmp_path / "shards")

    def run(name: str, steps: int, **options) -> list[str]:
        values = recipe(tmp_path / name, shards, training__steps=steps, **options)
        launch(train, (values,), 1, tmp_path / f"{name}-{steps}")
        return [line["sample_ids_hash"] for line in metrics(tmp_path / name)]

    whole, keyed = run("whole", 6, data__order="permutation"), run("keyed", 6)
    assert whole[0] != keyed[0]
    run("begun", 3, data__order="permutation")
    path = tmp_path / "begun" / "recipe.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["data"]["order"], stored["data"]["cache_limit"]
    path.write_text(yaml.safe_dump(stored))
    assert run("begun", 6) == whole
    assert "data.order" not in (tmp_path / "begun" / "history.jsonl").read_text()  # nothing was changed
    assert yaml.safe_load(path.read_text())["data"]["order"] == "permutation"
    kept = settle(recipe(tmp_path / "keyed", shards)).data.order
    assert kept == "keyed" and "auto" not in (tmp_path / "keyed" / "recipe.yaml").read_text().split("micro")[0]
    values = recipe(tmp_path / "keyed", shards, training__steps=8, data__order="permutation")
    with pytest.raises(AssertionError, match=r"data\.order is keyed there and permutation here"):
        launch(train, (values,), 1, tmp_path / "refused")


def test_a_limit_without_windows_is_refused():
    with pytest.raises(UserError, match=r"data\.cache_limit is set and data\.order is permutation"):
        load_recipe("base_prior.yaml", ["data.order=permutation", "data.cache_limit=1"])
