"""The models that pictures are made with: which are needed, whether they belong together, and how they are loaded.

Both the command (``sample.py``) and the Python interface (``loaded.py``) use it.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.generation.settings import Decoding, DrawSettings, ModelSettings
from digit_ds.identity import Part, check_agreement
from digit_ds.model.released import located, read_config
from digit_ds.model.spec import TransformerSpec
from digit_ds.parallel import launch
from digit_ds.tokenizer.precision import precision_dtype
from digit_ds.tokenizer.vqgan import Vqgan, load_vqgan


class StageModel(NamedTuple):
    """A released model whose weights are not loaded yet."""

    given: str
    """As it was named, for messages."""
    directory: Path
    spec: TransformerSpec
    provenance: dict[str, Any]


PRIORS = ("prior", "vq")
"""Kinds of models that write first-stage tokens."""
Stages = dict[str, StageModel]
"""By ``prior`` and ``pixel_decoder``; one of them may be absent."""


class Arithmetic(NamedTuple):
    """Where and how models are computed."""

    device: torch.device
    precision: torch.dtype
    """Of the transformers."""
    vqgan_precision: torch.dtype
    batch: int
    """Pictures of one model call at most."""


class Encoding(NamedTuple):
    """How pictures become first-stage codes."""

    encode: Callable[[Tensor], Tensor]
    """float [B, 3, size, size] in [0, 1] -> int64 [B, G]."""
    size: int
    """Side of the cut in pixels."""
    resize: int
    """Short side of a picture before it is cut."""
    parts: list[Part]
    """What the files say of their origin."""


def arithmetic(settings: ModelSettings, device: torch.device) -> Arithmetic:
    """What the settings say, or the device's defaults."""
    on_gpu = device.type == "cuda"
    return Arithmetic(
        device,
        precision_dtype(settings.precision or ("bf16" if on_gpu else "fp64")),
        precision_dtype(settings.vqgan_precision),
        settings.batch or (512 if on_gpu else 64),
    )


def read_stages(settings: ModelSettings) -> Stages:
    """The configurations of the models that are given.

    Raises:
        UserError: a directory holds no model, or one of another kind.
    """
    stages = {}
    for name, directory, kinds in (
        ("prior", settings.prior, PRIORS),
        ("pixel_decoder", settings.pixel_decoder, ("ar", "nar")),
    ):
        if directory is not None:
            place = located(directory)
            spec, provenance, _ = read_config(place)
            if spec.kind not in kinds:
                raise UserError(
                    f"{directory}: has kind {spec.kind}, expected {' or '.join(kinds)} as {name.replace('_', ' ')}"
                )
            stages[name] = StageModel(directory, place, spec, provenance)
    return stages


def needed_stages(stages: Stages, given: bool, keep: int | None) -> Stages:
    """The models that a task needs, after checking that they fit each other and the task.

    Args:
        stages: from :func:`read_stages`.
        given: whether first-stage tokens, or pictures that they are made of, are given.
        keep: how many of them are kept; None: all.

    Raises:
        UserError: a model is missing, or one does not fit.
    """
    if keep is not None and not given:
        raise UserError("keep is given, but no pictures or tokens are given, expected --from-images or --from-tokens")
    if keep is not None and keep < 0:
        raise UserError(f"keep is {keep}, expected 0 or more leading tokens")
    if given and keep is None:
        if "pixel_decoder" not in stages:
            raise UserError(
                "decoder is not given, expected a pixel decoder to reconstruct from given tokens (--decoder)"
            )
        return {"pixel_decoder": stages["pixel_decoder"]}
    if "prior" not in stages:
        raise UserError("prior is not given, expected a model that samples the first-stage tokens (--prior)")
    prior, decoder = stages["prior"], stages.get("pixel_decoder")
    if keep is not None and keep > prior.spec.tokens:
        raise UserError(
            f"keep is {keep}, but a picture of {prior.given} has {prior.spec.tokens} tokens, expected 0 to "
            f"{prior.spec.tokens} (--keep)"
        )
    if prior.spec.kind == "vq":
        if decoder is not None:
            raise UserError(
                f"{prior.given}: writes VQ tokens itself, but {decoder.given} is given, expected no decoder"
            )
        return stages
    if decoder is None:
        raise UserError(f"{prior.given}: writes discriminative tokens, expected a pixel decoder too (--decoder)")
    for field in ("grid", "discriminative_codes"):
        ours, theirs = getattr(prior.spec, field), getattr(decoder.spec, field)
        if ours != theirs:
            raise UserError(f"{prior.given}: {field} is {ours}, but {decoder.given} has {theirs}; they must be equal")
    return stages


def first_stage(stages: Stages) -> StageModel:
    """The model whose first-stage tokens are written or given."""
    return stages["prior"] if "prior" in stages else stages["pixel_decoder"]


def load_painter(settings: ModelSettings, place: Arithmetic) -> Vqgan:
    """The VQGAN, compiled where that is asked for."""
    painter = load_vqgan(settings.vqgan, settings.vqgan_config, place.device, place.vqgan_precision)
    if settings.vqgan_compile:
        painter.compile_decoder()
    return painter


def load_encoding(
    settings: ModelSettings, first: StageModel, painter: Vqgan, device: torch.device, pictures: str
) -> Encoding:
    """The tokeniser of the first stage.

    Args:
        pictures: what is to be tokenised, for messages.

    Raises:
        UserError: the grid is not square, or the encoder or the codebook is not given.
    """
    rows, columns = first.spec.grid
    if rows != columns:
        raise UserError(
            f"{pictures}: cannot be tokenised for {first.directory}, its grid is {rows}x{columns}, expected a square "
            "one"
        )
    size = rows * painter.downsampling
    if first.spec.kind == "vq":
        return Encoding(painter.encode, size, settings.resize or size, [])
    if settings.encoder is None or settings.codebook is None:
        raise UserError(
            f"{pictures}: needs the encoder's weights and the codebook to be tokenised (--encoder, --codebook)"
        )
    from digit_ds.tokenizer.tokenizer import Tokenizer  # timm takes as long to import as torch

    tokenizer = Tokenizer(
        settings.encoder,
        settings.codebook,
        None,
        layer=first.provenance.get("layer"),
        num_heads=settings.num_heads,
        image_size=size,
        device=device,
    )
    codebook = {**tokenizer.codebook.provenance, "codebook_sha256": tokenizer.codebook.sha256}
    parts = [
        Part(f"codebook {settings.codebook}", codebook),
        Part(f"encoder {settings.encoder}", tokenizer.encoder.provenance()),
    ]
    return Encoding(tokenizer.discriminative, size, settings.resize or size, parts)


def check_parts(settings: ModelSettings, stages: Stages, painter: Vqgan, others: list[Part]) -> list[Part]:
    """All parts of a task, after checking that they belong together.

    Raises:
        UserError: two parts are of different origin, or the last model's VQ codes are not the VQGAN's.
    """
    parts = [Part(f"model {model.directory}", model.provenance) for model in stages.values()]
    parts += [Part(f"VQGAN {settings.vqgan}", {"vqgan_sha256": painter.sha256}), *others]
    check_agreement(parts)
    last = stages["pixel_decoder"] if "pixel_decoder" in stages else stages["prior"]
    if last.spec.vq_codes != painter.codes:
        raise UserError(
            f"{settings.vqgan}: has {painter.codes} codes, expected {last.spec.vq_codes} as {last.directory}"
        )
    return parts


def check_guidance(first: StageModel, decoding: Decoding) -> None:
    """Refuse guidance of a prior that has no classes or no unconditional half; warn where the latter is not known.

    Raises:
        UserError: names the model. A pixel decoder whose first-stage tokens are given draws without guidance.
    """
    if not decoding.guidance.active or first.spec.kind not in PRIORS:
        return
    if not first.spec.classes:
        raise UserError(
            f"{first.given}: is unconditional, but guidance scale is {decoding.guidance.scale}, expected 1 (no "
            "guidance) or a class-conditional prior (--guidance, --prior)"
        )
    if first.provenance.get("class_dropout") == 0:
        raise UserError(
            f"{first.directory}: guidance scale is {decoding.guidance.scale}, but the model was trained with "
            "training.class_dropout 0 and has no unconditional half, expected 1 (no guidance)"
        )
    if "class_dropout" not in first.provenance and launch.is_main():
        print(
            f"warning: {first.directory}: does not say whether it was trained with class dropout, which guidance "
            f"(scale {decoding.guidance.scale}) needs",
            file=sys.stderr,
        )


def decodings(settings: DrawSettings) -> Mapping[str, Decoding]:
    """How each stage's tokens are drawn, by the names of :data:`Stages`."""
    return {"prior": settings.prior_decoding, "pixel_decoder": settings.pixel_decoding}
