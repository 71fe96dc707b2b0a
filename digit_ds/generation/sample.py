"""``digit-ds sample``: models and settings in, a folder of pictures out."""

from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from typing import Any

import numpy as np

from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.generation.drawing import grouped, write_codes
from digit_ds.generation.job import SamplingJob
from digit_ds.generation.labels import choose_labels, labels_of
from digit_ds.generation.models import (
    arithmetic,
    check_guidance,
    check_parts,
    decodings,
    first_stage,
    load_encoding,
    load_painter,
    needed_stages,
    read_stages,
)
from digit_ds.generation.pictures import Originals
from digit_ds.generation.pipeline import Pipeline, make_sampler
from digit_ds.generation.settings import SampleSettings
from digit_ds.generation.sources import ImageFolder, Source, TokenFile
from digit_ds.identity import TOKENS, Part
from digit_ds.model.released import WEIGHTS
from digit_ds.model.transformer import load_model
from digit_ds.parallel import launch
from digit_ds.parallel.decide import agree, from_main, together, wait_for_all
from digit_ds.parallel.progress import progress


def sample(settings: SampleSettings) -> None:
    """Write pictures to ``settings.out`` (its layout: ``job.py``), alone or together with the other processes of
    the job.

    An interrupted job continues; a complete one is left as it is.

    Raises:
        UserError: parts do not belong together, ``out`` is another job's, or a setting cannot be.
    """
    launch.initialize()
    with together():
        place = arithmetic(settings, launch.device())
        if settings.labels is not None and settings.from_images is None:
            raise UserError(
                f"{settings.labels}: labels are given without pictures, expected --from-images with --labels"
            )
        given = settings.from_images is not None or settings.from_tokens is not None
        stages = needed_stages(read_stages(settings), given, settings.keep)
        first = first_stage(stages)
        painter = load_painter(settings, place)
        source: Source | None = None
        origins: list[Part] = []
        if settings.from_tokens is not None:
            written = "vq" if first.spec.kind == "vq" else "discriminative"
            limit = first.spec.vq_codes if written == "vq" else first.spec.discriminative_codes
            source = TokenFile(settings.from_tokens, written, first.spec.tokens, limit)
            origins.append(source.part)
        elif settings.from_images is not None:
            encoding = load_encoding(settings, first, painter, place.device, settings.from_images)
            source = ImageFolder(
                settings.from_images, encoding.size, encoding.resize, encoding.encode, place.device, settings.labels
            )
            origins += encoding.parts
        parts = check_parts(settings, stages, painter, origins)

        labels, names = choose_labels(
            first.directory, first.spec, first.provenance, source, settings.count, settings.per_class, settings.classes
        )
        decoding = decodings(settings)
        check_guidance(first, decoding["prior"])
        record = {
            **settings.record(),
            **{name: sha256(model.directory / WEIGHTS) for name, model in stages.items()},
            "vqgan": painter.sha256,
            "prior_decoding": decoding["prior"].record() if "prior" in stages else None,
            "pixel_decoding": decoding["pixel_decoder"].record() if "pixel_decoder" in stages else None,
            "count": len(labels),
            "classes": None
            if settings.classes is None
            else labels_of(first.directory, first.spec, first.provenance, settings.classes),
            "precision": _dtype_name(place.precision),
            "vqgan_precision": _dtype_name(place.vqgan_precision),
            "vqgan_compiled": settings.vqgan_compile or None,
            "source": None if source is None else {**source.identity, "keep": settings.keep},
        }
    record = agree(_jsonable(record), f"{settings.out}, its settings")
    origin = {key: part.provenance[key] for part in parts for key in TOKENS if part.provenance.get(key) is not None}
    job = SamplingJob(settings.out, record, labels, names, origin)
    with job.begin() as directory:
        if directory.found:
            if settings.adm_array:
                from_main(job.write_adm_array)
            if launch.is_main():
                print(f"{settings.out}: complete already, {job.count} pictures")
            return
        rows = min(place.batch, len(labels))
        with together():
            samplers = {
                name: make_sampler(
                    load_model(model.directory, place.device, place.precision), decoding[name], settings.seed, rows
                )
                for name, model in stages.items()
            }
        job.start()
        pipeline = Pipeline(samplers.get("prior"), samplers.get("pixel_decoder"), painter)
        _run(job, pipeline, source, settings.keep, rows)
        wait_for_all()
        originals = None
        if isinstance(source, ImageFolder):
            originals = Originals(source.picture, first.spec.grid, settings.keep)
        from_main(lambda: job.finish(settings.adm_array, originals))
    if launch.is_main():
        print(f"{settings.out}: {job.count} pictures, an overview in grid.png")


def _dtype_name(dtype: object) -> str:
    """What a job's record calls a precision."""
    return str(dtype).removeprefix("torch.")


def _jsonable(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    return [_jsonable(part) for part in value] if isinstance(value, (list, tuple)) else value


def _pictures(job: SamplingJob, blocks: list[int]) -> int:
    """How many pictures are in ``blocks``."""
    return sum(len(job.images(block)) for block in blocks)


def _run(job: SamplingJob, pipeline: Pipeline, source: Source | None, keep: int | None, rows: int) -> None:
    """Write this process's missing blocks; pictures are compressed in threads while the next tokens are drawn."""
    missing = from_main(job.missing_blocks)
    done = job.count - _pictures(job, missing)
    pending: list[Future] = []
    with (
        ThreadPoolExecutor(min(16, cpu_count() or 1)) as writers,
        progress(total=job.count, initial=done, description="sampling", unit="pictures") as bar,
    ):
        groups = list(grouped(missing, rows, launch.world_size()))
        for group in groups[launch.rank() :: launch.world_size()]:
            images = [image for block in group for image in job.images(block)]
            codes = write_codes(pipeline, images, job.labels, source, keep)
            for future in pending:
                future.result()
            pending.clear()
            start = 0
            for block in group:
                own = slice(start, start + len(job.images(block)))
                start = own.stop
                tokens = {
                    name: part[own].numpy().astype(np.uint16)
                    for name, part in codes._asdict().items()
                    if part is not None
                }
                pending.append(writers.submit(job.write_block, block, pipeline.paint(codes.vq[own]), tokens))
            finished = job.count - _pictures(job, job.missing_blocks())
            bar.update(finished - bar.n)
        for future in pending:
            future.result()
        bar.update(job.count - _pictures(job, job.missing_blocks()) - bar.n)
