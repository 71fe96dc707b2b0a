"""Token shards of an image folder: discriminative and VQ tokens of the same views, in one pass."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from digit_ds.data.images import Crops, class_name
from digit_ds.data.shards import COLUMNS, ShardManifest, merge_blocks, write_block
from digit_ds.files import read_json, write_json
from digit_ds.parallel.decide import from_main, together, wait_for_all
from digit_ds.parallel.launch import device, initialize, is_main
from digit_ds.preparation.jobs import Job, default_workers
from digit_ds.preparation.loading import Batch, Loading
from digit_ds.preparation.pipeline import Encoded, EncodingPipeline
from digit_ds.preparation.settings import TokenSettings
from digit_ds.preparation.staging import separate_queues
from digit_ds.preparation.writing import WriterProcess
from digit_ds.tokenizer.tokenizer import Tokenizer


def tokenize_images(settings: TokenSettings) -> None:
    """Write token shards of ``views`` views of every image of a folder.

    Raises:
        UserError: folder, weights, codebook or output directory cannot be used or do not belong together, or too many
            images are unreadable.
    """
    if settings.decoder == "gpu":
        separate_queues()
    initialize()
    with together():
        tokenizer = Tokenizer(
            settings.encoder,
            settings.codebook,
            settings.vqgan,
            vqgan_config=settings.vqgan_config,
            layer=settings.layer,
            num_heads=settings.num_heads,
            image_size=settings.image_size,
            precision=settings.precision,
            compile=settings.compile,
            device=device(),
        )
    size = tokenizer.image_size
    ten = settings.crops == "ten-crop"
    resize, views = settings.resize or (round(1.1 * size) if ten else size), settings.views or (10 if ten else 1)
    cut = Crops(settings.crops, size, resize, views, settings.seed, settings.flips)
    filled_in = {"views": cut.views, "resize": cut.resize}  # defaults that depend on the parts
    record = {"job": "tokens", "provenance": tokenizer.provenance(), **settings.record(), **filled_in}
    workers = default_workers() if settings.workers is None else settings.workers
    loading = Loading(cut, settings.batch, workers, settings.decoder)
    with Job(
        settings.out, settings.images, record, settings.block_images, True, settings.labels, settings.class_order
    ) as job:
        if job.complete:
            if is_main():
                print(f"{settings.out}: already complete, nothing to do")
            return
        missing = job.my_blocks(lambda block: (job.out / _block_name(block)).is_dir())
        with BlockWriter(job, tokenizer, cut) as write:
            pipeline = EncodingPipeline(loading, device(), lambda pixels, _extra: tokenizer.encode(pixels), write)
            pipeline.run(job, missing, "tokens")
        wait_for_all()
        from_main(lambda: _merge(job, tokenizer, cut, settings.max_skipped))
        wait_for_all()


class BlockWriter:
    """Writes blocks of a job's samples, in a process of its own (MDS is many small steps of Python). Use ``with``."""

    def __init__(self, job: Job, tokenizer: Tokenizer, crops: Crops) -> None:
        self.out, self.views = job.out, crops.views
        self.columns = [name for name in COLUMNS if name != "vq" or tokenizer.vqgan is not None]
        self.labels = {name: label for label, name in enumerate(job.classes)}
        self._process = WriterProcess(self._write)

    def __enter__(self) -> Callable[[int, list[Encoded]], None]:
        self._process.__enter__()
        return lambda block, encoded: self._process(block, [(item.batch, item.arrays()) for item in encoded])

    def __exit__(self, *failure: Any) -> None:
        self._process.__exit__(*failure)

    def _write(self, block: int, encoded: list[tuple[Batch, list[np.ndarray]]]) -> None:
        """Write a block under a passing name of its own; its proper name makes it count."""
        final = self.out / _block_name(block)
        passing = self.out / f".{final.name}.{uuid.uuid4().hex}"
        write_block(passing, self._samples(encoded), self.columns)
        write_json(passing / "report.json", {"skipped": [entry for batch, _ in encoded for entry in batch.skipped]})
        try:
            passing.rename(final)
        except OSError:
            # The writer of a killed run may have lived on and finished this very block meanwhile.
            if not final.is_dir():
                raise
            shutil.rmtree(passing)

    def _samples(self, encoded: list[tuple[Batch, list[np.ndarray]]]) -> Iterator[dict[str, Any]]:
        """Samples of one block: image by image, view by view."""
        for batch, outputs in encoded:
            tokens = [codes.astype(np.uint16) for codes in outputs]  # each [B, G]
            for position, (name, number) in enumerate(zip(batch.names, batch.numbers)):
                for view in range(self.views):
                    row = position * self.views + view
                    sample = {
                        "discriminative": tokens[0][row],
                        "label": self.labels.get(class_name(name) or "", -1),
                        "image_id": name,
                        "index": number,
                        "view": view,
                    }
                    if len(tokens) > 1:
                        sample["vq"] = tokens[1][row]
                    yield sample


def _block_name(block: int) -> str:
    return f"block-{block:05d}"


def _merge(job: Job, tokenizer: Tokenizer, crops: Crops, max_skipped: float) -> None:
    """Write the index over all blocks, then the manifest."""
    blocks = [_block_name(block) for block in range(job.blocks)]
    skipped = job.finish((read_json(job.out / block / "report.json") for block in blocks), max_skipped)
    index_sha256 = merge_blocks(job.out, blocks)
    manifest = ShardManifest(
        images=job.images - skipped,
        views=crops.views,
        classes=job.classes,
        grid=tokenizer.grid,
        image_size=tokenizer.image_size,
        discriminative_codes=tokenizer.codebook.codes,
        vq_codes=tokenizer.vq_codes,
        crops=crops.kind,
        provenance=tokenizer.provenance(),
        skipped=skipped,
        index_sha256=index_sha256,
    )
    manifest.write(job.out)
    print(f"{job.out}: {manifest.samples} samples of {manifest.images} images, {skipped} skipped")
