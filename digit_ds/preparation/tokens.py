"""Token shards of an image folder: discriminative and VQ tokens of the same views, in one pass."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from digit_ds.data.images import CropKind, Crops, class_name
from digit_ds.data.shards import COLUMNS, ShardManifest, merge_blocks, write_block
from digit_ds.files import read_json, write_json
from digit_ds.parallel.decide import from_main, together, wait_for_all
from digit_ds.parallel.launch import device, initialize, is_main
from digit_ds.preparation.jobs import Job, default_workers
from digit_ds.preparation.loading import Batch, Loading
from digit_ds.preparation.pipeline import Conveyor, Encoded
from digit_ds.preparation.settings import JpegDecoder
from digit_ds.preparation.staging import separate_queues
from digit_ds.preparation.writing import WriterProcess
from digit_ds.tokenizer.tokenizer import Tokenizer

BLOCK_IMAGES = 1024
"""Images of one block of shards."""


def tokenize_images(
    images: Path | str,
    encoder: Path | str,
    codebook: Path | str,
    vqgan: Path | str | None,
    out: Path | str,
    *,
    vqgan_config: Path | str | None = None,
    layer: int = 3,
    num_heads: int | None = None,
    views: int | None = None,
    crops: CropKind = "training",
    image_size: int | None = None,
    resize: int | None = None,
    flips: bool = True,
    seed: int = 0,
    batch: int = 256,
    precision: str = "fp32",
    compile: bool = False,
    decoder: JpegDecoder = "cpu",
    workers: int | None = None,
    block_images: int = BLOCK_IMAGES,
    max_skipped: float = 0.25,
) -> None:
    """Write token shards of ``views`` views of every image of a folder.

    Args:
        images: image folder; its first-level folders are the classes.
        encoder: DINOv2-format weights.
        codebook: centroids ``.npy`` [K, E].
        vqgan: VQGAN checkpoint; None: discriminative tokens alone.
        out: new directory, or one in which this very job was begun.
        vqgan_config: taming-style YAML; None: the published sizes.
        layer: which block from the end gives the features.
        num_heads: attention heads where the weights do not follow the published width // 64.
        views: samples per image. Default: 1, and 10 with ``ten-crop``.
        crops: how views are cut, see ``digit_ds.data.images.CropKind``.
        image_size: side of a view. Default: the largest that the encoder takes (256 of DINOv2).
        resize: length of an image's short side before cropping. Default: ``image_size``, 1.1 times that for
            ``ten-crop``.
        flips: whether random views may be mirrored; not for pictures that mean something else then, such as digits.
        seed: seed of crops and flips; what is drawn depends on it, the image's name and the view alone.
        batch: views at a time.
        precision: arithmetic of encoder and VQGAN, ``fp32``, ``bf16`` or ``fp16``.
        compile: fuse encoder and VQGAN with torch.compile: faster after a minute's work, other rounding.
        decoder: where JPEG files are decoded, ``cpu`` or ``gpu``.
        workers: decoding processes per rank. Default: the machine's cores, shared among its ranks.
        block_images: images per block of shards, the unit of restarting.
        max_skipped: largest share of images that may be unreadable.

    Raises:
        UserError: folder, weights, codebook or output directory cannot be used or do not belong together, or too many
            images are unreadable.
    """
    if decoder == "gpu":
        separate_queues()
    initialize()
    with together():
        tokenizer = Tokenizer(
            encoder,
            codebook,
            vqgan,
            vqgan_config=vqgan_config,
            layer=layer,
            num_heads=num_heads,
            image_size=image_size,
            precision=precision,
            compile=compile,
            device=device(),
        )
    size = tokenizer.image_size
    ten = crops == "ten-crop"
    cut = Crops(crops, size, resize or (round(1.1 * size) if ten else size), views or (10 if ten else 1), seed, flips)
    settings = {
        "job": "tokens",
        "provenance": tokenizer.provenance(),
        "views": cut.views,
        "crops": cut.kind,
        "resize": cut.resize,
        "flips": cut.flips,
        "seed": seed,
        "batch": batch,
        "precision": precision,
        "compile": compile,
        "decoder": decoder,
    }
    loading = Loading(cut, batch, default_workers() if workers is None else workers, decoder)
    with Job(out, images, settings, block_images, labelled=True) as job:
        if job.complete:
            if is_main():
                print(f"{out}: already complete, nothing to do")
            return
        missing = job.my_blocks(lambda block: (job.out / _block_name(block)).is_dir())
        with BlockWriter(job, tokenizer, cut) as write:
            conveyor = Conveyor(loading, device(), lambda pixels, _extra: tokenizer.encode(pixels), write)
            conveyor.run(job, missing, "tokens")
        wait_for_all()
        from_main(lambda: _merge(job, tokenizer, cut, max_skipped))
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
