"""Features of an image folder, for K-Means: chunks that can be memory-mapped, and a manifest.

```
FEATURES/chunk-00000.npy    [rows, E] features of the first block of images, image by image, patch by patch; those in
                            bf16 as their bits in uint16, since ``.npy`` has no such type
FEATURES/chunk-00000.json   rows, hash and skipped images of that chunk: the chunk is complete
FEATURES/manifest.json      provenance, counts and chunks, besides what every job writes (``jobs``)
```
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit_ds.data.images import Crops, uniforms
from digit_ds.errors import UserError
from digit_ds.files import read_json, sha256, write_atomically, write_json
from digit_ds.parallel.decide import from_main, together, wait_for_all
from digit_ds.parallel.launch import device, initialize, is_main
from digit_ds.preparation.jobs import Job, default_workers
from digit_ds.preparation.loading import Loading
from digit_ds.preparation.pipeline import Encoded, EncodingPipeline
from digit_ds.preparation.settings import FeatureSettings
from digit_ds.preparation.staging import separate_queues
from digit_ds.tokenizer.encoder import load_encoder
from digit_ds.tokenizer.precision import precision_dtype

STORED = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}
"""Type of a chunk file by the name of what it holds."""


def extract_features(settings: FeatureSettings) -> None:
    """Write the encoder's features of one random crop of every image of a folder.

    Raises:
        UserError: the folder, the weights or the output directory cannot be used, or too many images are unreadable.
    """
    if settings.decoder == "gpu":
        separate_queues()
    initialize()
    with together():
        dtype = precision_dtype(settings.precision)
        model = load_encoder(settings.encoder, settings.layer, settings.num_heads, device=device(), dtype=dtype)
    if settings.compile:
        model.compile()
    size = settings.image_size or min(model.image_sizes)
    rows, columns = model.grid(size)
    patches = rows * columns
    if settings.points is not None and settings.points > patches:
        raise UserError(
            f"points is {settings.points}, expected 1 to {patches}, the patches of an image of {size} pixels"
        )
    crops = Crops("random", size, size, 1, settings.seed, settings.flips)
    provenance = model.provenance() | {"image_size": size}
    record = {"job": "features", "provenance": provenance, **settings.record()}
    workers = default_workers() if settings.workers is None else settings.workers
    loading = Loading(crops, settings.batch, workers, settings.decoder)

    def annotate(name: str) -> np.ndarray:
        """Which patches of an image are kept: bool [G]."""
        draw = uniforms(patches, settings.seed, name, "patches")
        if settings.points is not None:
            return np.argsort(np.argsort(draw, kind="stable"), kind="stable") < settings.points
        return draw < (1.0 if settings.fraction is None else settings.fraction)

    def encode(pixels: Tensor, keep: list[np.ndarray]) -> tuple[Tensor]:
        features = model(pixels)  # [B, G, E]
        kept = torch.from_numpy(np.flatnonzero(np.concatenate(keep))).to(features.device, non_blocking=True)
        features = features.flatten(0, 1).index_select(0, kept).to(precision_dtype(settings.dtype))
        return (features.view(torch.uint16) if settings.dtype == "bf16" else features,)

    def write(block: int, encoded: list[Encoded]) -> None:
        _write_chunk(Path(settings.out), block, encoded, model.width, STORED[settings.dtype])

    with Job(settings.out, settings.images, record, settings.block_images, labels=settings.labels) as job:
        if job.complete:
            if is_main():
                print(f"{settings.out}: already complete, nothing to do")
            return
        missing = job.my_blocks(lambda block: _report_path(job.out, block).is_file())
        EncodingPipeline(loading, device(), encode, write, annotate).run(job, missing, "features")
        wait_for_all()
        from_main(lambda: _merge(job, provenance, model.width, settings.dtype, settings.max_skipped))
        wait_for_all()


def _report_path(out: Path, block: int) -> Path:
    return out / f"chunk-{block:05d}.json"


def _write_chunk(out: Path, block: int, encoded: list[Encoded], width: int, dtype: type) -> None:
    """Write one chunk, then the report that makes it count."""
    parts: list[np.ndarray] = [np.empty((0, width), dtype)]
    skipped: list[dict[str, str]] = []
    for item in encoded:
        parts.extend(item.arrays())
        skipped.extend(item.batch.skipped)
    rows = np.concatenate(parts)  # [rows, E]
    path = out / f"chunk-{block:05d}.npy"
    write_atomically(path, lambda temporary: np.save(temporary, rows))
    report = {"file": path.name, "rows": len(rows), "sha256": sha256(path), "skipped": skipped}
    write_json(_report_path(out, block), report)


def _merge(job: Job, provenance: dict[str, Any], width: int, dtype: str, max_skipped: float) -> None:
    """Write the manifest over all chunks."""
    reports = [read_json(_report_path(job.out, block)) for block in range(job.blocks)]
    skipped = job.finish(reports, max_skipped)
    chunks = [{key: report[key] for key in ("file", "rows", "sha256")} for report in reports if report["rows"]]
    count = sum(chunk["rows"] for chunk in chunks)
    manifest = {
        "format": 1,
        "provenance": provenance,
        "count": count,
        "width": width,
        "dtype": dtype,
        "images": job.images - skipped,
        "skipped": skipped,
        "chunks": chunks,
    }
    write_json(job.out / "manifest.json", manifest)
    print(f"{job.out}: {count} features of width {width} from {job.images - skipped} images, {skipped} skipped")
