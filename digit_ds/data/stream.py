"""Token batches for training, from MDS shards on disk or in an object store.

The order of samples is :mod:`digit_ds.data.order`'s: a position in an endless sequence of epochs is all there is to
resume from, at any data-parallel size, and every epoch sees every image once: no repeats to fill a batch, none left
out. StreamingDataset fetches, decompresses and checks the shards; its own iteration order is not used, because it pads
epochs to the number of ranks, workers and canonical nodes. Token shards are small (1 KB a sample), so that samples in
any order cost no more than in shard order once a shard is in the local cache.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from digit_ds.data.cache import complete, default_cache, prepare, remove_orphans
from digit_ds.data.cached import CachedShards
from digit_ds.data.mosaic import StreamingDataset
from digit_ds.data.objects import is_address
from digit_ds.data.order import InOrder, KeyedOrder, Order, StoredOrder
from digit_ds.data.shards import ShardManifest, read_manifest
from digit_ds.data.streaming_memory import forget_killed, one_job_at_a_time, own_numbers
from digit_ds.errors import UserError, is_lost_peer
from digit_ds.parallel import launch, shared_memory
from digit_ds.parallel.decide import fail_together, from_main
from digit_ds.parallel.workers import ignore_stop_signals

_MIX = np.uint64(0x9E3779B97F4A7C15)


class TokenBatch(NamedTuple):
    """One micro-batch of token codes."""

    discriminative: Tensor
    """int64 [B, G]"""
    vq: Tensor | None
    """int64 [B, G]; None where the shards have no VQ tokens."""
    labels: Tensor
    """int64 [B], -1: none."""
    real: Tensor
    """bool [B]; False for repeats that only fill the last batch of a validation pass."""
    samples: Tensor
    """int64 [B]: image number x views + view."""
    image_ids: list[str]
    """Paths of the images relative to their folder, for messages."""

    def check_labels(self, classes: int, shards: str) -> None:
        """Refuse a sample without a class, on the host: on a device nothing would notice it.

        Raises:
            UserError: names the first such image.
        """
        for label, image in zip(self.labels.tolist(), self.image_ids):
            if not 0 <= label < classes:
                raise UserError(
                    f"{shards}: image {image} has label {label}, but a class-conditional model expects one of "
                    f"0..{classes - 1}"
                )


class Chunks(NamedTuple):
    """Which micro-batches of each global batch are this rank's: chunk ``m x data_size + data_rank`` for ``m`` = 0.."""

    global_batch: int
    micro_batch: int
    data_rank: int = 0
    data_size: int = 1

    @property
    def per_step(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch // (self.micro_batch * self.data_size)


def sample_hash(samples: Tensor) -> int:
    """Sum over sample ids of 40 well-mixed bits each: equal for equal sets of samples, however they are split."""
    mixed = samples.numpy().astype(np.uint64) * _MIX
    return int((mixed >> np.uint64(24)).sum())


def chained_hash(before: int, samples: int) -> int:
    """``sample_ids_hash`` after a step: from that before it and the sum of :func:`sample_hash` over all ranks."""
    return (before * 6364136223846793005 + samples) % 2**64


class TokenStream:
    """The endless sequence of samples of one shard directory.

    Args:
        shards: local directory or object-store URL.
        cache: local directory for decompressed shards; unset: one in the temporary folder (:mod:`digit_ds.data.cache`).
        seed: of the order and of each image's first view.
        owner: path that distinguishes default caches; two live datasets must not share one.
        order: ``keyed``; ``permutation``, that of runs begun before there was a choice; ``none``: images in their
            order, view 0 (validation).
        cache_limit: GiB that the cache of a node may take; None: all shards. With ``keyed`` alone.

    Raises:
        UserError: the shards cannot be read, or the cache is another job's or other data.
    """

    def __init__(
        self,
        shards: str,
        cache: str | None = None,
        seed: int = 0,
        owner: str = "",
        order: Literal["keyed", "permutation", "none"] = "keyed",
        cache_limit: float | None = None,
    ) -> None:
        self.shards, self._held = shards, None
        self.manifest = from_main(lambda: read_manifest(shards))
        content, owner = self.manifest.index_sha256, str(Path(owner).absolute())
        self.cache, self._named = Path(cache).absolute() if cache else default_cache(content, owner), bool(cache)
        problem = None
        if launch.local_rank() == 0:
            try:
                self._held = prepare(self.cache, content, owner, self._named)
                remove_orphans(owner, keep=self.cache)
                complete(self.cache, content, shards)
            except UserError as error:
                problem = str(error)
                if self._held is not None:
                    self._held.close()
        fail_together(problem)
        limit = None if cache_limit is None else int(cache_limit * 2**30)
        dataset = _open(shards, str(self.cache), limit)
        self.dataset = _Samples(dataset, self.manifest, _order(order, self.manifest, seed, dataset, limit))

    def close(self) -> None:
        """Remove the default cache, after a run's orderly end; every process calls it."""
        launch.barrier()
        if self._held is not None:
            if not self._named:
                shutil.rmtree(self.cache, ignore_errors=True)
            self._held.close()

    def batches(self, chunks: Chunks, position: int = 0, workers: int = 0) -> Iterator[TokenBatch]:
        """This rank's micro-batches of all global batches from ``position`` (samples seen so far) on, for ever."""
        return self._load(_endless(chunks, position), workers)

    def epoch(self, micro_batch: int, data_rank: int, data_size: int) -> Iterator[TokenBatch]:
        """This rank's share of one pass over all images; all ranks get equally many batches, filled with repeats."""
        images = self.manifest.images
        rounds = -(-images // (micro_batch * data_size))
        starts = [(turn * data_size + data_rank) * micro_batch for turn in range(rounds)]
        return self._load([list(range(start, start + micro_batch)) for start in starts], workers=0, wrap=True)

    def _load(self, batches, workers: int, wrap: bool = False) -> Iterator[TokenBatch]:
        self.dataset.last = self.manifest.images if wrap else None
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=_collate,
            num_workers=workers,
            worker_init_fn=ignore_stop_signals,
            prefetch_factor=4 if workers else None,
        )
        return map(_batch, iter(loader))  # the processes start now


def _endless(chunks: Chunks, position: int) -> Iterator[list[int]]:
    """Positions of this rank's chunks, global batch after global batch."""
    while True:
        for micro in range(chunks.per_step):
            start = position + (micro * chunks.data_size + chunks.data_rank) * chunks.micro_batch
            yield list(range(start, start + chunks.micro_batch))
        position += chunks.global_batch


class _Samples(Dataset):
    """Position in the endless sequence -> sample."""

    def __init__(self, dataset: StreamingDataset, manifest: ShardManifest, order: Order) -> None:
        self.dataset, self.views, self.order = dataset, manifest.views, order
        self.last: int | None = None

    def __getitems__(self, positions: list[int]) -> list[dict]:
        """Samples of a batch, as DataLoader asks for them: their order is computed together."""
        images, views = self.order.places(positions)
        return [self._sample(*place) for place in zip(positions, images.tolist(), views.tolist())]

    def _sample(self, position: int, image: int, view: int) -> dict:
        try:
            sample = dict(self.dataset[image * self.views + view])
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{self.dataset.streams[0].remote}: a shard cannot be read ({error})") from error
        if sample["view"] != view:
            raise UserError(
                f"{self.dataset.streams[0].remote}: sample {image * self.views + view} is view "
                f"{sample['view']}, expected {view}: the views of an image must follow each other"
            )
        sample["sample"] = image * self.views + view
        sample["real"] = self.last is None or position < self.last
        return sample


def _order(kind: str, manifest: ShardManifest, seed: int, dataset: StreamingDataset, cache_limit: int | None) -> Order:
    if kind == "none":
        return InOrder(manifest.images)
    if kind == "permutation":
        return StoredOrder(manifest.images, manifest.views, seed)
    window = None
    if cache_limit is not None:
        # Two windows are in use where one ends, and a shard that comes needs room before another one goes.
        room = cache_limit - sum(stream.get_index_size() for stream in dataset.streams)
        fitting = room // max(shard.get_max_size() for shard in dataset.shards)
        if fitting < 4:
            raise _too_low(cache_limit, dataset.streams[0].remote)
        window = (fitting - 1) // 2
    return KeyedOrder(manifest.images, manifest.views, seed, dataset.samples_per_shard.tolist(), window)


def _collate(samples: list[dict]) -> dict[str, np.ndarray | list[str]]:
    """Samples stacked, in a loading process. Arrays go to the rank through a pipe; tensors would go through /dev/shm,
    which is small in containers. Decoded arrays are read-only views of the shard: stacking copies."""
    columns = [name for name in ("discriminative", "vq", "label", "real", "sample") if name in samples[0]]
    stacked: dict[str, np.ndarray | list[str]] = {name: np.stack([s[name] for s in samples]) for name in columns}
    return stacked | {"image_ids": [sample["image_id"] for sample in samples]}


def _batch(stacked: dict[str, Any]) -> TokenBatch:
    """A batch of tensors; int64 is what embeddings read."""

    def tensor(name: str, dtype: type = np.int64) -> Tensor:
        found = torch.from_numpy(stacked[name].astype(dtype))
        return found.pin_memory() if torch.cuda.is_available() else found

    return TokenBatch(
        discriminative=tensor("discriminative"),
        vq=tensor("vq") if "vq" in stacked else None,
        labels=tensor("label"),
        real=tensor("real", np.bool_),
        samples=torch.from_numpy(stacked["sample"].astype(np.int64)),
        image_ids=stacked["image_ids"],
    )


def _open(shards: str, cache: str, cache_limit: int | None = None) -> StreamingDataset:
    """The dataset. Each shard's hash is checked when it enters the cache.

    A local directory is read through the cache too: shards are compressed, and the directory may be read-only.
    """
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), launch.world_size()
    if world % local or (world > 1 and "LOCAL_WORLD_SIZE" not in os.environ):
        raise UserError(f"LOCAL_WORLD_SIZE is {local}, expected the processes of a node out of {world}")
    remote = shards if is_address(shards) else str(Path(shards).absolute())
    forget_killed(cache)
    fail_together(shared_memory.shortage(shared_memory.LEAST))
    try:
        with one_job_at_a_time(), own_numbers(cache):
            return CachedShards(remote, cache, cache_limit)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        if is_lost_peer(error):  # StreamingDataset's barriers
            raise
        if cache_limit is not None and "cache limit" in str(error).lower():
            raise _too_low(cache_limit, shards) from error
        raise UserError(
            f"{shards}: cannot be opened ({' '.join(str(error).split())}), expected token shards"
        ) from error


def _too_low(cache_limit: int, shards: str | None) -> UserError:
    return UserError(
        f"data.cache_limit is {cache_limit:,} bytes, expected at least the index of {shards} and four of its "
        "largest shards, compressed and decompressed"
    )
