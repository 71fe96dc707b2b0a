"""``digit-ds sample``: models and settings in, a folder of pictures out."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from os import cpu_count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.generation.job import SamplingJob
from digit_ds.generation.labels import choose_labels, labels_of
from digit_ds.generation.pipeline import BLOCK, Pipeline, make_sampler
from digit_ds.generation.settings import Decoding
from digit_ds.generation.sources import ImageFolder, Source, TokenFile
from digit_ds.identity import Part, check_agreement
from digit_ds.model.released import WEIGHTS, read_config
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import Transformer, load_model
from digit_ds.parallel import launch
from digit_ds.parallel.decide import agree, from_main, together, wait_for_all
from digit_ds.parallel.progress import progress
from digit_ds.tokenizer.vqgan import Vqgan, load_vqgan

Precision = Literal["float64", "float32", "bfloat16"]


class _Model(NamedTuple):
    """A released model that is not loaded yet."""

    directory: Path
    spec: TransformerSpec
    provenance: dict[str, Any]


def sample(
    out_dir: Path | str,
    *,
    vqgan: Path | str,
    vqgan_config: Path | str | None = None,
    prior: Path | str | None = None,
    pixel_decoder: Path | str | None = None,
    count: int | None = None,
    per_class: int | None = None,
    classes: Sequence[int | str] | None = None,
    prior_decoding: Decoding | None = None,
    pixel_decoding: Decoding | None = None,
    seed: int = 0,
    batch: int | None = None,
    precision: Precision | None = None,
    vqgan_precision: Literal["float32", "float16", "bfloat16"] = "float32",
    vqgan_compile: bool = False,
    adm_array: bool = False,
    from_images: Path | str | None = None,
    encoder: Path | str | None = None,
    num_heads: int | None = None,
    codebook: Path | str | None = None,
    resize: int | None = None,
    from_tokens: Path | str | None = None,
    keep: int | None = None,
) -> None:
    """Write ``count`` pictures to ``out_dir`` (its layout: ``job.py``), alone or together with the other processes of
    the job.

    An interrupted job continues; a complete one is left as it is.

    Args:
        out_dir: new, empty, or this very job's.
        vqgan: checkpoint of the VQGAN that paints; ``vqgan_config`` as for ``load_vqgan``.
        prior: directory of a ``prior`` or ``vq`` model; not needed when all first-stage tokens are given.
        pixel_decoder: directory of an ``ar`` or ``nar`` model; not for a ``vq`` model.
        count: number of pictures; or
        per_class: pictures of each class.
        classes: labels to draw, in turn; None: all classes of a class-conditional prior, which makes them balanced.
        prior_decoding: how first-stage tokens are drawn, guidance included.
        pixel_decoding: how VQ tokens are drawn.
        seed: one seed for the job; every image derives its own from its number.
        batch: images that a process computes together; default 64 on CPUs, 512 on GPUs.
        precision: of the transformers; default float64 on CPUs (then no batch size changes a token), bfloat16 on GPUs.
        vqgan_precision: of the painting; halves are several times as fast on a GPU. Of 255 levels float16 changes
            pixels by one at most, bfloat16 by half a level on average and a few at most (``tests/test_vqgan.py``).
        vqgan_compile: compile the painting with torch.compile, which pays off for thousands of pictures; pixels may
            then differ between processes by rounding.
        adm_array: also write ``samples.npz``.
        from_images: folder of pictures whose tokens are taken instead of drawn; with ``encoder`` (weights) and
            ``codebook`` unless the prior is a ``vq`` model; ``num_heads`` as for ``load_encoder``.
        resize: short side of those pictures before the centre is cut out, as the model's tokens were made; None: the
            size of the cut.
        from_tokens: ``.npz`` of first-stage tokens to take, such as a job's ``tokens.npz``.
        keep: how many leading tokens of each given image to keep, the prior writing the rest; None: all.

    Raises:
        UserError: parts do not belong together, ``out_dir`` is another job's, or an argument cannot be.
    """
    launch.initialize()
    with together():
        device = launch.device()
        precision = precision or ("bfloat16" if device.type == "cuda" else "float64")
        batch = batch or (512 if device.type == "cuda" else 64)
        for name, number in (("batch", batch), ("count", count), ("count per class", per_class)):
            if number is not None and number < 1:
                raise UserError(f"{name} is {number}, expected at least 1")
        given = from_images is not None or from_tokens is not None
        stages = _stages(prior, pixel_decoder, given, keep)
        first = stages["prior"] if "prior" in stages else stages["pixel_decoder"]
        painter = load_vqgan(vqgan, vqgan_config, device, getattr(torch, vqgan_precision))
        if vqgan_compile:
            painter.compile_decoder()
        source: Source | None = None
        parts = [Part(f"model {model.directory}", model.provenance) for model in stages.values()]
        parts.append(Part(f"VQGAN {vqgan}", {"vqgan_sha256": painter.sha256}))
        if from_tokens is not None:
            written = "vq" if first.spec.kind == "vq" else "discriminative"
            limit = first.spec.vq_codes if written == "vq" else first.spec.discriminative_codes
            source = TokenFile(from_tokens, written, first.spec.tokens, limit)
        elif from_images is not None:
            source, used = _image_source(from_images, resize, encoder, num_heads, codebook, first, painter, device)
            parts += used
        check_agreement(parts)
        _check_vqgan(painter, stages, vqgan)

        labels, names = choose_labels(first.directory, first.spec, first.provenance, source, count, per_class, classes)
        prior_decoding, pixel_decoding = prior_decoding or Decoding(), pixel_decoding or Decoding()
        if prior_decoding.guidance.active and first.provenance.get("class_dropout") == 0:
            raise UserError(
                f"{first.directory}: guidance scale is {prior_decoding.guidance.scale}, but the model was trained with "
                "training.class_dropout 0 and has no unconditional half, expected 1 (no guidance)"
            )
        settings = {
            **{name: sha256(model.directory / WEIGHTS) for name, model in stages.items()},
            "vqgan": painter.sha256,
            "prior_decoding": asdict(prior_decoding) if "prior" in stages else None,
            "pixel_decoding": asdict(pixel_decoding) if "pixel_decoder" in stages else None,
            "count": len(labels),
            "classes": None if classes is None else labels_of(first.directory, first.spec, first.provenance, classes),
            "seed": seed,
            "precision": precision,
            "vqgan_precision": vqgan_precision,
            "vqgan_compiled": vqgan_compile or None,
            "source": None if source is None else {**source.identity, "keep": keep},
        }
    settings = agree(_jsonable(settings), f"{out_dir}, its settings")
    job = SamplingJob(out_dir, settings, labels, names)
    with job.begin() as directory:
        if directory.found:
            if launch.is_main():
                print(f"{out_dir}: complete already, {job.count} pictures")
            return
        rows = min(batch, len(labels))
        decodings = {"prior": prior_decoding, "pixel_decoder": pixel_decoding}
        with together():
            samplers = {
                name: make_sampler(_load(model, device, precision), decodings[name], seed, rows)
                for name, model in stages.items()
            }
        pipeline = Pipeline(samplers.get("prior"), samplers.get("pixel_decoder"), painter)
        _run(job, pipeline, source, keep, rows)
        wait_for_all()
        from_main(lambda: job.finish(adm_array))
    if launch.is_main():
        print(f"{out_dir}: {job.count} pictures")


def _stages(
    prior: Path | str | None, pixel_decoder: Path | str | None, given: bool, keep: int | None
) -> dict[str, _Model]:
    """The models that are needed, after checking that they fit each other and the task."""
    stages = {}
    for name, directory, kinds in (("prior", prior, ("prior", "vq")), ("pixel_decoder", pixel_decoder, ("ar", "nar"))):
        if directory is not None:
            spec, provenance, _ = read_config(Path(directory))
            if spec.kind not in kinds:
                raise UserError(
                    f"{directory}: is a {spec.kind} model, expected {' or '.join(kinds)} as {name.replace('_', ' ')}"
                )
            stages[name] = _Model(Path(directory), spec, provenance)
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
    root: Path | str,
    resize: int | None,
    encoder: Path | str | None,
    num_heads: int | None,
    codebook: Path | str | None,
    first: _Model,
    painter: Vqgan,
    device: torch.device,
) -> tuple[ImageFolder, list[Part]]:
    """The tokeniser of ``from_images`` and what its files say of their origin."""
    rows, columns = first.spec.grid
    if rows != columns:
        raise UserError(f"{root}: cannot be tokenised for {first.directory}, whose grid {rows}x{columns} is not square")
    size = rows * painter.downsampling
    if first.spec.kind == "vq":
        return ImageFolder(root, size, resize or size, painter.encode, device), []
    if encoder is None or codebook is None:
        raise UserError(f"{root}: needs the encoder's weights and the codebook to be turned into tokens")
    from digit_ds.tokenizer.tokenizer import Tokenizer  # timm takes as long to import as torch

    layer = first.provenance.get("layer")
    tokenizer = Tokenizer(encoder, codebook, None, layer=layer, num_heads=num_heads, image_size=size, device=device)
    parts = [
        Part(
            f"codebook {codebook}",
            {**tokenizer.codebook.provenance, "codebook_sha256": tokenizer.codebook.sha256},
        ),
        Part(f"encoder {encoder}", tokenizer.encoder.provenance()),
    ]
    return ImageFolder(root, size, resize or size, tokenizer.discriminative, device), parts


def _check_vqgan(painter: Vqgan, stages: dict[str, _Model], path: Path | str) -> None:
    """The last model's VQ codes are the VQGAN's."""
    last = stages["pixel_decoder"] if "pixel_decoder" in stages else stages["prior"]
    if last.spec.vq_codes != painter.codes:
        raise UserError(f"{path}: has {painter.codes} codes, but {last.directory} writes {last.spec.vq_codes}")


def _load(model: _Model, device: torch.device, precision: Precision) -> Transformer:
    return load_model(model.directory, device=device, dtype=getattr(torch, precision))


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
