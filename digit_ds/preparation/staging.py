"""From loaded batches to images on the device, a step ahead of it: copies and GPU decoding in threads of their own."""

import os
import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from digit_ds.data.images import UnreadableImageError, decode
from digit_ds.preparation.jobs import Job
from digit_ds.preparation.loading import HELD, Batch, Loading

AHEAD = 2
"""Batches that lie ready on the device."""
Item = TypeVar("Item")


def separate_queues() -> None:
    """Let nvJPEG's kernels pass those of the encoder; to be called before CUDA starts in this process.

    A GPU has 8 queues by default, which all streams share, and kernels in one queue run in its order. nvJPEG alone has
    14 streams: some would stand behind all that the encoder was sent. A value in the environment is kept.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class Staged(NamedTuple):
    """A batch whose views are on the device."""

    batch: Batch
    views: Tensor
    """uint8 [images x views, 3, size, size]."""
    ready: torch.cuda.Event | None


class _End(NamedTuple):
    failure: BaseException | None


def stage(batches: Iterator[Batch], job: Job, loading: Loading, device: torch.device) -> Generator[Staged, None, None]:
    """Batches in order, ``AHEAD`` of them ready on the device: one thread collects them, another one stages them."""
    # Of high priority: its kernels are short, and the next batch waits for them among the encoder's.
    stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
    collected = ahead(batches, HELD - 2, "collecting")
    staged = ahead((_stage_on(stream, batch, job, loading, device) for batch in collected), AHEAD, "staging")
    with closing(collected), closing(staged):
        for item in staged:
            if item.ready:
                item.ready.wait(torch.cuda.current_stream(device))
                item.views.record_stream(torch.cuda.current_stream(device))
            yield item


def ahead(items: Iterator[Item], depth: int, name: str) -> Generator[Item, None, None]:
    """``items`` in order, taken by a thread that keeps ``depth`` of them ready; its exceptions are raised here."""
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Item | _End) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_End(None))
        except BaseException as error:  # raised in the consumer
            put(_End(error))

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.failure:
            raise item.failure
    finally:
        stopped.set()
        thread.join()


def _stage_on(
    stream: torch.cuda.Stream | None, batch: Batch, job: Job, loading: Loading, device: torch.device
) -> Staged:
    """Stage one batch; on a GPU in ``stream``, without waiting for it."""
    if stream is None:
        return Staged(batch, _channels_first(torch.cat(batch.data)) if batch.data else torch.empty(0), None)
    with torch.cuda.stream(stream):
        views = _gpu_views(batch, job, loading, device)
        event = torch.cuda.Event()
        event.record(stream)
    return Staged(batch, views, event)


def _gpu_views(batch: Batch, job: Job, loading: Loading, device: torch.device) -> Tensor:
    """Views of a batch on a GPU, from the workers' pixels and from JPEG files; unreadable images leave the batch."""
    from digit_ds.preparation.gpu_views import decode_views  # needs Triton, which comes with PyTorch for GPUs

    size, views = loading.crops.size, loading.crops.views
    cuts = {number: windows for number, windows in enumerate(batch.windows) if windows is not None}
    jpegs = list(cuts)
    decoded = torch.empty(0, views, 3, size, size, dtype=torch.uint8, device=device)
    if jpegs:
        windows = torch.from_numpy(np.stack(list(cuts.values())))
        try:
            decoded = decode_views([batch.data[number] for number in jpegs], windows, size, device)
        except RuntimeError:  # one of them is damaged: Pillow finds out which
            _decode_on_cpu(batch, jpegs, job, loading)
    cut = [number for number, windows in enumerate(batch.windows) if windows is None]
    pixels = torch.empty(len(cut), views, size, size, 3, dtype=torch.uint8, pin_memory=True)
    for target, number in zip(pixels, cut):
        target.copy_(batch.data[number])
    pixels = pixels.to(device, non_blocking=True)
    if not len(decoded):
        return _channels_first(pixels.flatten(0, 1))
    if not cut:
        return decoded.flatten(0, 1)
    order = torch.tensor(cut + jpegs).argsort().pin_memory().to(device, non_blocking=True)
    return torch.cat([pixels.movedim(-1, 2), decoded]).index_select(0, order).flatten(0, 1)


def _decode_on_cpu(batch: Batch, numbers: list[int], job: Job, loading: Loading) -> None:
    """Decode the images of the given positions with Pillow; those that cannot be are moved to ``skipped``."""
    for number in reversed(numbers):
        name = batch.names[number]
        try:
            batch.data[number] = torch.from_numpy(loading.crops.cut(decode(job.source.read(name)), name))
            batch.windows[number] = None
        except UnreadableImageError as error:
            batch.skipped.append({"image": name, "reason": str(error)})
            for values in (batch.names, batch.numbers, batch.data, batch.windows, batch.extra):
                if values:
                    del values[number]


def _channels_first(pixels: Tensor) -> Tensor:
    """[B, H, W, 3] -> [B, 3, H, W] without moving a byte: the channels-last layout that convolutions like."""
    return pixels.permute(0, 3, 1, 2)
