"""Token shards of an image folder: discriminative and VQ tokens of the same views, in one pass."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit_ds.data.images import CropKind, Crops, class_name
from digit_ds.data.shards import COLUMNS, ShardManifest, merge_blocks, write_block
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json
from digit_ds.parallel.launch import device, is_main
from digit_ds.preparation.jobs import Job, default_workers
from digit_ds.preparation.loading import Batch, JpegDecoder, Loading
from digit_ds.preparation.pipeline import Conveyor, Encoded, precision_dtype
from digit_ds.preparation.staging import separate_queues
from digit_ds.preparation.writing import WriterProcess
from digit_ds.tokenizer.codebook import Codebook, load_codebook
from digit_ds.tokenizer.encoder import load_encoder
from digit_ds.tokenizer.vqgan import load_vqgan

BLOCK_IMAGES = 1024
"""Images of one block of shards."""
LARGEST_CODE = np.iinfo(np.uint16).max


class Tokenizer:
    """Encoder, codebook and, if given, VQGAN that belong together: images -> both kinds of tokens."""

    def __init__(
        self,
        encoder: Path | str,
        codebook: Path | str,
        vqgan: Path | str | None,
        *,
        vqgan_config: Path | str | None = None,
        layer: int = 3,
        num_heads: int | None = None,
        image_size: int | None = None,
        precision: str = "fp32",
        compile: bool = False,
    ) -> None:
        """Load the three and refuse what does not fit together: width, provenance, token grid."""
        dtype = precision_dtype(precision)
        self.encoder = load_encoder(encoder, layer, num_heads, device=device(), dtype=dtype)
        self.codebook = load_codebook(codebook, device=device())
        self.vqgan = load_vqgan(vqgan, vqgan_config, device=device(), dtype=dtype) if vqgan else None
        if self.vqgan is not None and device().type == "cuda":
            self.vqgan.network.to(memory_format=torch.channels_last)
        self.image_size = image_size or max(self.encoder.image_sizes)
        self.grid = list(self.encoder.grid(self.image_size))
        _check_codebook(self.codebook, Path(codebook), self.encoder, Path(encoder))
        if self.vqgan is not None:
            factor = self.vqgan.downsampling
            vq_grid = [self.image_size // factor] * 2
            if self.image_size % factor or vq_grid != self.grid:
                raise UserError(
                    f"{vqgan}: makes {vq_grid[0]} x {vq_grid[1]} tokens of an image of {self.image_size} pixels, but "
                    f"{encoder} makes {self.grid[0]} x {self.grid[1]}; expected the same grid"
                )
            if self.vqgan.codes - 1 > LARGEST_CODE:
                raise UserError(f"{vqgan}: has {self.vqgan.codes} codes, expected at most {LARGEST_CODE + 1}")

        if compile:
            self.encoder.compile()
            if self.vqgan is not None:
                self.vqgan.network.encoder.compile()

    @property
    def vq_codes(self) -> int:
        """N, 0 without a VQGAN."""
        return self.vqgan.codes if self.vqgan is not None else 0

    def provenance(self) -> dict[str, Any]:
        """Which files and which transform the tokens come from."""
        return self.encoder.provenance() | {
            "image_size": self.image_size,
            "codebook_sha256": self.codebook.sha256,
            "vqgan_sha256": self.vqgan.sha256 if self.vqgan is not None else None,
        }

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Float [B, 3, H, W] in [0, 1] -> discriminative codes and, with a VQGAN, VQ codes: int64 [B, G] each."""
        codes = self.codebook.assign(self.encoder(images))
        return (codes,) if self.vqgan is None else (codes, self.vqgan.encode(images))


def _check_codebook(codebook: Codebook, path: Path, encoder: Any, weights: Path) -> None:
    """Refuse a codebook that was not made from this encoder's features."""
    width = codebook.centroids.shape[1]
    if width != encoder.width:
        raise UserError(
            f"{path}: has centroids of width {width}, but {weights} gives features of width {encoder.width}"
        )
    if codebook.codes - 1 > LARGEST_CODE:
        raise UserError(f"{path}: has {codebook.codes} codes, expected at most {LARGEST_CODE + 1}")
    ours = encoder.provenance()
    for key in ("encoder_sha256", "layer", "transform"):
        if key in codebook.provenance and codebook.provenance[key] != ours[key]:
            raise UserError(
                f"{path}: was made from features with {key} {codebook.provenance[key]}, but {weights} has "
                f"{key} {ours[key]}; expected the same encoder"
            )


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
    with Job(out, images, settings, block_images) as job:
        if job.complete:
            if is_main():
                print(f"{out}: already complete, nothing to do")
            return
        missing = job.my_blocks(lambda block: (job.out / _block_name(block)).is_dir())
        with BlockWriter(job, tokenizer, cut) as write:
            conveyor = Conveyor(loading, device(), lambda pixels, _extra: tokenizer.encode(pixels), write)
            conveyor.run(job, missing, "tokens")
        job.barrier()
        job.on_main(lambda: _merge(job, tokenizer, cut, max_skipped))
        job.barrier()


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
                        "label": self.labels.get(class_name(name), -1),
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
