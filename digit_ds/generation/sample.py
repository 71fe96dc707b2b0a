"""``digit-ds sample``: models and settings in, a folder of pictures out."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.generation.job import SamplingJob
from digit_ds.generation.labels import choose_labels, labels_of
from digit_ds.generation.pipeline import BLOCK, Pipeline, make_sampler
from digit_ds.generation.settings import SampleSettings
from digit_ds.generation.sources import ImageFolder, Source, TokenFile
from digit_ds.identity import TOKENS, Part, check_agreement
from digit_ds.model.released import WEIGHTS, located, read_config
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import load_model
from digit_ds.parallel import launch
from digit_ds.parallel.decide import agree, from_main, together, wait_for_all
from digit_ds.parallel.progress import progress
from digit_ds.tokenizer.precision import precision_dtype
from digit_ds.tokenizer.vqgan import Vqgan, load_vqgan


class _Model(NamedTuple):
    """A released model that is not loaded yet."""

    directory: Path
    spec: TransformerSpec
    provenance: dict[str, Any]


def sample(settings: SampleSettings) -> None:
    """Write pictures to ``settings.out`` (its layout: ``job.py``), alone or together with the other processes of
    the job.

    An interrupted job continues; a complete one is left as it is.

    Raises:
        UserError: parts do not belong together, ``out`` is another job's, or a setting cannot be.
    """
    launch.initialize()
    with together():
        device = launch.device()
        precision = precision_dtype(settings.precision or ("bf16" if device.type == "cuda" else "fp64"))
        vqgan_precision = precision_dtype(settings.vqgan_precision)
        batch = settings.batch or (512 if device.type == "cuda" else 64)
        given = settings.from_images is not None or settings.from_tokens is not None
        if settings.labels is not None and settings.from_images is None:
            raise UserError(f"{settings.labels}: labels are given, but no pictures (from_images) that they could be of")
        stages = _stages(settings.prior, settings.pixel_decoder, given, settings.keep)
        first = stages["prior"] if "prior" in stages else stages["pixel_decoder"]
        painter = load_vqgan(settings.vqgan, settings.vqgan_config, device, vqgan_precision)
        if settings.vqgan_compile:
            painter.compile_decoder()
        source: Source | None = None
        parts = [Part(f"model {model.directory}", model.provenance) for model in stages.values()]
        parts.append(Part(f"VQGAN {settings.vqgan}", {"vqgan_sha256": painter.sha256}))
        if settings.from_tokens is not None:
            written = "vq" if first.spec.kind == "vq" else "discriminative"
            limit = first.spec.vq_codes if written == "vq" else first.spec.discriminative_codes
            source = TokenFile(settings.from_tokens, written, first.spec.tokens, limit)
            parts.append(source.part)
        elif settings.from_images is not None:
            source, used = _image_source(settings, first, painter, device)
            parts += used
        check_agreement(parts)
        _check_vqgan(painter, stages, settings.vqgan)

        labels, names = choose_labels(
            first.directory, first.spec, first.provenance, source, settings.count, settings.per_class, settings.classes
        )
        prior_decoding, pixel_decoding = settings.prior_decoding, settings.pixel_decoding
        if prior_decoding.guidance.active and first.provenance.get("class_dropout") == 0:
            raise UserError(
                f"{first.directory}: guidance scale is {prior_decoding.guidance.scale}, but the model was trained with "
                "training.class_dropout 0 and has no unconditional half, expected 1 (no guidance)"
            )
        record = {
            **settings.record(),
            **{name: sha256(model.directory / WEIGHTS) for name, model in stages.items()},
            "vqgan": painter.sha256,
            "prior_decoding": prior_decoding.record() if "prior" in stages else None,
            "pixel_decoding": pixel_decoding.record() if "pixel_decoder" in stages else None,
            "count": len(labels),
            "classes": None
            if settings.classes is None
            else labels_of(first.directory, first.spec, first.provenance, settings.classes),
            "precision": _dtype_name(precision),
            "vqgan_precision": _dtype_name(vqgan_precision),
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
        rows = min(batch, len(labels))
        decodings = {"prior": prior_decoding, "pixel_decoder": pixel_decoding}
        with together():
            samplers = {
                name: make_sampler(load_model(model.directory, device, precision), decodings[name], settings.seed, rows)
                for name, model in stages.items()
            }
        pipeline = Pipeline(samplers.get("prior"), samplers.get("pixel_decoder"), painter)
        _run(job, pipeline, source, settings.keep, rows)
        wait_for_all()
        from_main(lambda: job.finish(settings.adm_array))
    if launch.is_main():
        print(f"{settings.out}: {job.count} pictures")


def _stages(
    prior: Path | str | None, pixel_decoder: Path | str | None, given: bool, keep: int | None
) -> dict[str, _Model]:
    """The models that are needed, after checking that they fit each other and the task."""
    stages = {}
    for name, directory, kinds in (("prior", prior, ("prior", "vq")), ("pixel_decoder", pixel_decoder, ("ar", "nar"))):
        if directory is not None:
            place = located(directory)
            spec, provenance, _ = read_config(place)
            if spec.kind not in kinds:
                raise UserError(
                    f"{directory}: is a {spec.kind} model, expected {' or '.join(kinds)} as {name.replace('_', ' ')}"
                )
            stages[name] = _Model(place, spec, provenance)
    if keep is not None and not given:
        raise UserError("keep is given, but no pictures or tokens to keep anything of")
    if keep is not None and keep < 0:
        raise UserError(f"keep is {keep}, expected 0 or more leading tokens")
    if given and keep is None:
        if "pixel_decoder" not in stages:
            raise UserError("no pixel decoder is given, expected one to reconstruct from given tokens")
        stages.pop("prior", None)
        return stages
    if "prior" not in stages:
        raise UserError("no prior is given, expected one to draw the first-stage tokens")
    first = stages["prior"]
    if first.spec.kind == "vq":
        if "pixel_decoder" in stages:
            raise UserError(f"{prior}: writes VQ tokens itself, but a pixel decoder was given too")
        return stages
    if "pixel_decoder" not in stages:
        raise UserError(
            f"{prior}: writes discriminative tokens, but no pixel decoder is given to turn them into VQ tokens"
        )
    for field in ("grid", "discriminative_codes"):
        ours, theirs = (getattr(stages[name].spec, field) for name in ("prior", "pixel_decoder"))
        if ours != theirs:
            raise UserError(f"{prior}: {field} is {ours}, but {pixel_decoder} has {theirs}; they must be equal")
    return stages


def _image_source(
    settings: SampleSettings, first: _Model, painter: Vqgan, device: torch.device
) -> tuple[ImageFolder, list[Part]]:
    """The tokeniser of ``from_images`` and what its files say of their origin."""
    root, codebook, encoder = settings.from_images, settings.codebook, settings.encoder
    assert root is not None  # the caller has looked
    rows, columns = first.spec.grid
    if rows != columns:
        raise UserError(f"{root}: cannot be tokenised for {first.directory}, whose grid {rows}x{columns} is not square")
    size = rows * painter.downsampling
    if first.spec.kind == "vq":
        return ImageFolder(root, size, settings.resize or size, painter.encode, device, settings.labels), []
    if encoder is None or codebook is None:
        raise UserError(f"{root}: needs the encoder's weights and the codebook to be turned into tokens")
    from digit_ds.tokenizer.tokenizer import Tokenizer  # timm takes as long to import as torch

    layer = first.provenance.get("layer")
    tokenizer = Tokenizer(
        encoder, codebook, None, layer=layer, num_heads=settings.num_heads, image_size=size, device=device
    )
    parts = [
        Part(
            f"codebook {codebook}",
            {**tokenizer.codebook.provenance, "codebook_sha256": tokenizer.codebook.sha256},
        ),
        Part(f"encoder {encoder}", tokenizer.encoder.provenance()),
    ]
    encode = tokenizer.discriminative
    return ImageFolder(root, size, settings.resize or size, encode, device, settings.labels), parts


def _check_vqgan(painter: Vqgan, stages: dict[str, _Model], path: Path | str) -> None:
    """The last model's VQ codes are the VQGAN's."""
    last = stages["pixel_decoder"] if "pixel_decoder" in stages else stages["prior"]
    if last.spec.vq_codes != painter.codes:
        raise UserError(f"{path}: has {painter.codes} codes, but {last.directory} writes {last.spec.vq_codes}")


def _dtype_name(dtype: torch.dtype) -> str:
    """What a job's record calls a precision."""
    return str(dtype).removeprefix("torch.")


def _jsonable(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    return [_jsonable(part) for part in value] if isinstance(value, (list, tuple)) else value


def _share(missing: list[int], rows: int) -> Iterator[list[int]]:
    """This process's groups of blocks. A group fills the rows of a model call, unless that would leave processes
    idle."""
    per_process = -(-len(missing) // launch.world_size())
    size = max(1, min(rows // BLOCK, per_process))
    groups = [missing[start : start + size] for start in range(0, len(missing), size)]
    yield from groups[launch.rank() :: launch.world_size()]


def _run(job: SamplingJob, pipeline: Pipeline, source: Source | None, keep: int | None, rows: int) -> None:
    """Write this process's missing blocks; pictures are compressed in threads while the next tokens are drawn."""
    missing = from_main(job.missing_blocks)
    done = job.blocks - len(missing)
    conditional = pipeline.prior is not None and bool(pipeline.prior.spec.classes)
    pending: list[Future] = []
    with (
        ThreadPoolExecutor(min(16, cpu_count() or 1)) as writers,
        progress(total=job.blocks, initial=done, description="sampling", unit=f"x{BLOCK} pictures") as bar,
    ):
        for group in _share(missing, rows):
            images = torch.tensor([image for block in group for image in job.images(block)])
            labels = torch.tensor(job.labels)[images] if conditional else None
            known = None
            if source is not None:
                known = source.codes(images)
                if keep is not None:
                    known[:, keep:] = -1
            codes = pipeline.write(images, labels, known)
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
            finished = job.blocks - len(job.missing_blocks())
            bar.update(finished - bar.n)
        for future in pending:
            future.result()
        bar.update(job.blocks - len(job.missing_blocks()) - bar.n)
