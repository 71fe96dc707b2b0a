"""The pipeline of a job: workers decode, the device encodes, a thread writes finished blocks, all at the same time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from digit_ds.parallel.progress import progress
from digit_ds.parallel.workers import worker_errors_in_one_line
from digit_ds.preparation.jobs import Job
from digit_ds.preparation.loading import Batch, Loading
from digit_ds.preparation.staging import Staged, stage

IN_FLIGHT = 3
"""Batches that the device may be behind, and blocks that the writer may be behind."""


class Encoded(NamedTuple):
    """One batch with what the device made of it."""

    batch: Batch
    """Without its pixels."""
    outputs: tuple[Tensor, ...]
    """In host memory; on a GPU to be read after ``ready`` only."""
    ready: torch.cuda.Event | None

    def arrays(self) -> list[np.ndarray]:
        """The outputs, once they have arrived."""
        if self.ready:
            self.ready.synchronize()
        return [output.numpy() for output in self.outputs]


class EncodingPipeline:
    """Moves a rank's blocks through decoding, encoding and writing.

    ``encode(images, extra)`` takes float [B, 3, H, W] in [0, 1] on the device, and what ``annotate(name)`` gave for
    each image in a worker; it returns tensors on the device. On a GPU B is always that of a full batch, the images past
    the last one black, so that shapes never change. ``write(block, encoded)`` gets the batches of one block.
    """

    def __init__(
        self,
        loading: Loading,
        device: torch.device,
        encode: Callable[[Tensor, list[np.ndarray]], tuple[Tensor, ...]],
        write: Callable[[int, list[Encoded]], None],
        annotate: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        self.loading, self.device, self.encode, self.write, self.annotate = loading, device, encode, write, annotate

    @torch.inference_mode()
    def run(self, job: Job, blocks: list[int], description: str) -> None:
        """Do the given blocks.

        Raises:
            UserError: a loading process was killed, or ``write`` raised it.
        """
        with worker_errors_in_one_line():
            self._run(job, blocks, description)

    def _run(self, job: Job, blocks: list[int], description: str) -> None:
        images = sum(min(job.block_images, job.images - block * job.block_images) for block in blocks)
        encoded: list[Encoded] = []
        in_flight: list[torch.cuda.Event] = []
        writing: list[Future] = []
        batches = self.loading.batches(job, blocks, self.annotate)
        with (
            ThreadPoolExecutor(1) as writer,
            progress(total=images, description=description, unit="images") as bar,
            closing(stage(batches, job, self.loading, self.device)) as staged_batches,
        ):
            for staged in staged_batches:
                encoded.append(self._encode(staged))
                if encoded[-1].ready:
                    in_flight.append(encoded[-1].ready)
                    if len(in_flight) > IN_FLIGHT:
                        in_flight.pop(0).synchronize()
                batch = staged.batch
                bar.update(len(batch.names) + len(batch.skipped))
                if batch.last:
                    if len(writing) >= IN_FLIGHT:
                        writing.pop(0).result()
                    writing.append(writer.submit(self.write, batch.block, encoded))
                    encoded = []
            for future in writing:
                future.result()

    def _encode(self, staged: Staged) -> Encoded:
        """Send a batch through the device without waiting for it."""
        batch, views = staged.batch, staged.views
        batch.data, batch.windows = [], []
        if not batch.names:
            return Encoded(batch, (), None)
        if self.device.type != "cuda":
            return Encoded(batch, self.encode(views.float() / 255, batch.extra), None)
        missing = self.loading.images_per_batch * self.loading.crops.views - len(views)
        if missing:
            views = torch.cat([views, views.new_zeros(missing, *views.shape[1:])])
        outputs = self.encode(views.float() / 255, batch.extra)
        host = tuple(torch.empty(o.shape, dtype=o.dtype, pin_memory=True).copy_(o, non_blocking=True) for o in outputs)
        ready = torch.cuda.Event()
        ready.record()
        return Encoded(batch, host, ready)
