"""Settings of a sampling job, and how tokens are drawn: one record for the autoregressive and the parallel sampler."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from digit_ds.errors import UserError
from digit_ds.settings import Option, PathText, Section, ShortPrecision

Schedule = Literal["constant", "linear", "cosine", "power-cosine"]
SMALLEST, LARGEST = 1e-6, 1e6
"""Temperatures and scales between these keep logits finite in every precision."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a class-conditional prior.

    The logits become ``unconditional + scale * (conditional - unconditional)``; 1 is no guidance. The prior must have
    been trained with ``training.class_dropout``, which is what teaches it the unconditional start.
    """

    scale: float = 1.0
    """Scale at its highest."""
    schedule: Schedule = "constant"
    """``linear`` and ``cosine`` rise from 1 at the first token to ``scale`` at the last. ``power-cosine`` is the
    schedule of MDT (arXiv 2303.14389) and RAR (arXiv 2411.00776), as RAR's published sampler computes it: at token t of
    T, counted from 0, the scale is ``1 + (scale - 1) * (1 - cos(pi * (t / T) ** exponent)) / 2``. It divides by T, not
    by T - 1, so that published scales and exponents mean the same here; the last token stays just below ``scale``.
    """
    interval: tuple[float, float] = (0.0, 1.0)
    """Share of the way through the image (first token 0, last 1) between which guidance acts, ends included."""
    exponent: float = 1.0
    """Of ``power-cosine``: above 1, guidance rises later. RAR's models use 2.75 (base) to 1.2 (largest)."""

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= LARGEST:
            raise UserError(f"guidance scale is {self.scale}, expected 0 to {LARGEST:g} (1: no guidance)")
        if self.schedule not in get_args(Schedule):
            raise UserError(f"guidance schedule is {self.schedule!r}, expected {', '.join(get_args(Schedule))}")
        if not SMALLEST <= self.exponent <= LARGEST:
            raise UserError(f"guidance exponent is {self.exponent}, expected {SMALLEST:g} to {LARGEST:g}")
        if self.exponent != 1 and self.schedule != "power-cosine":
            raise UserError(
                f"guidance exponent is {self.exponent}, but guidance schedule is {self.schedule!r}, expected "
                "power-cosine"
            )
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(
                f"guidance interval is {self.interval}, expected two numbers with 0 <= first <= second <= 1"
            )

    @property
    def active(self) -> bool:
        """Whether a second, unconditional pass is needed at all."""
        return self.scale != 1.0

    def scales(self, tokens: int) -> list[float]:
        """The scale at each of ``tokens`` positions."""
        scales = []
        for position in range(tokens):
            way = position / max(tokens - 1, 1)
            match self.schedule:
                case "constant":
                    rise = 1.0
                case "linear":
                    rise = way
                case "cosine":
                    rise = (1 - math.cos(math.pi * way)) / 2
                case "power-cosine":
                    rise = (1 - math.cos(math.pi * (position / tokens) ** self.exponent)) / 2
            inside = self.interval[0] <= way <= self.interval[1]
            scales.append(1 + (self.scale - 1) * rise if inside else 1.0)
        return scales


@dataclass(frozen=True)
class Decoding:
    """How one model's tokens are drawn. The published settings: top-k 200 (base) or 400 (large) for priors, top-p 0.8
    for an autoregressive pixel decoder, 8 steps with choice temperature 4.5 for a parallel one.
    """

    temperature: float = 1.0
    """Sampling temperature, by which the logits are divided."""
    top_k: int | None = None
    """Only the k most probable codes; None: all. 1 is greedy decoding."""
    top_p: float | None = None
    """Only the most probable codes that make up this mass; None: all."""
    guidance: Guidance = Guidance()
    """Classifier-free guidance (class-conditional models)."""
    steps: int = 8
    """Iterations of a parallel decoder."""
    choice_temperature: float = 4.5
    """Weight of the Gumbel noise on a parallel decoder's confidence; falls to 0 over the steps."""

    def record(self) -> dict[str, Any]:
        """What a job's record says, as JSON gives it back; an option added later is left out at its default."""
        return _record(self, _FIRST_DECODING) | {"guidance": _record(self.guidance, _FIRST_GUIDANCE)}

    def __post_init__(self) -> None:
        if not SMALLEST <= self.temperature <= LARGEST:
            raise UserError(
                f"temperature is {self.temperature}, expected a number above 0 (greedy decoding is top-k 1), "
                f"{SMALLEST:g} to {LARGEST:g}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}, expected greater than 0, at most 1")
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, expected at least 1")
        if not 0 <= self.choice_temperature <= LARGEST:
            raise UserError(f"choice temperature is {self.choice_temperature}, expected 0 to {LARGEST:g}")


_FIRST_DECODING = ("temperature", "top_k", "top_p", "steps", "choice_temperature")
_FIRST_GUIDANCE = ("scale", "schedule", "interval")


def _record(options: Guidance | Decoding, first: tuple[str, ...]) -> dict[str, Any]:
    """Options that every record has, and those added later that are not at their default; tuples become lists."""
    values = {option.name: (getattr(options, option.name), option.default) for option in fields(options)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in values.items()
        if name in first or (name != "guidance" and value != default)
    }


_Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]
_Scale = Annotated[float, Field(ge=0, le=LARGEST)]
_PRIOR = Option(group="sampling from the prior (published: top-k 200 for base, 400 for large)")
_PIXELS = Option(group="sampling from the pixel decoder (published: top-p 0.8 for AR; 8 steps for NAR)")
_GIVEN = "starting from given pictures or tokens"


class ModelSettings(Section):
    """The models that pictures are made with, and their arithmetic: what is loaded once, whatever is drawn."""

    prior: PathText | None = None
    """Model directory, or hf://OWNER/NAME, of a prior, or of a VQ baseline (which needs no decoder)."""
    pixel_decoder: Annotated[PathText | None, Option(name="decoder")] = None
    """Model directory, or hf://OWNER/NAME, of an AR or NAR pixel decoder."""
    vqgan: PathText
    """VQGAN checkpoint."""
    vqgan_config: PathText | None = None
    """Configuration of the VQGAN, taming-style YAML; default: a .yaml of the checkpoint's name beside it, or MAGE's."""
    encoder: Annotated[PathText | None, Option(group=_GIVEN)] = None
    """Encoder weights, to tokenise given pictures."""
    num_heads: Annotated[int | None, Option(group=_GIVEN)] = Field(None, ge=1)
    """Attention heads of the encoder; default: those of the published models."""
    codebook: Annotated[PathText | None, Option(group=_GIVEN)] = None
    """Codebook (.npy), to tokenise given pictures."""
    resize: Annotated[int | None, Option(group=_GIVEN)] = Field(None, ge=1)
    """Short side in pixels to which given pictures are resized before the centre crop; default: the crop's size."""
    batch: int | None = Field(None, ge=1)
    """Pictures per forward pass and process; in fp64, the default on CPUs, it does not change the pictures; default: 64
    on CPUs, 512 on GPUs."""
    precision: Annotated[Literal["fp64", "fp32", "bf16"] | None, ShortPrecision] = None
    """Floating-point precision of the transformers; default: fp64 on CPUs, bf16 on GPUs."""
    vqgan_precision: Annotated[Literal["fp32", "fp16", "bf16"], ShortPrecision] = "fp32"
    """Floating-point precision of the VQGAN. fp16 and bf16 are several times faster on a GPU; fp16 changes 8-bit pixel
    values by at most 1, bf16 by 0.5 on average and a few at most."""
    vqgan_compile: bool = False
    """Compile the decoder of the VQGAN with torch.compile, worthwhile for thousands of pictures on a GPU; pixels may
    differ by rounding."""


class DrawSettings(Section):
    """Which pictures are drawn, and how their tokens are."""

    count: int | None = Field(None, ge=1)
    """Number of pictures, distributed over the classes in turn."""
    per_class: int | None = Field(None, ge=1)
    """Number of pictures of each class; excludes ``--count``."""
    classes: Annotated[list[int | str] | None, Option(metavar="CLASS")] = None
    """Labels or names of the classes to sample, in turn; default: all, or the classes of the given pictures."""
    seed: int = 0
    """Seed of the job; the seed of a picture is derived from it and from the number of the picture."""
    keep: Annotated[int | None, Option(group=_GIVEN)] = Field(None, ge=0)
    """Number of leading tokens of each given picture to keep; the prior samples the rest; default: all."""

    temperature: Annotated[_Positive, _PRIOR] = 1.0
    """Sampling temperature, by which the logits are divided."""
    top_k: Annotated[int | None, _PRIOR] = Field(None, ge=1)
    """Sample from the k most probable codes only; 1 is greedy decoding; default: all codes."""
    top_p: Annotated[float | None, _PRIOR] = Field(None, gt=0, le=1)
    """Sample from the fewest most probable codes whose probabilities sum to at least this; default: all codes."""
    guidance: Annotated[_Scale, _PRIOR] = 1.0
    """Scale of classifier-free guidance; 1: no guidance."""
    guidance_schedule: Annotated[Schedule, _PRIOR] = "constant"
    """``linear`` and ``cosine`` rise from 1 at the first token to the scale at the last; ``power-cosine``, as in
    RAR, is ``1 + (scale - 1) * (1 - cos(pi * (t / T) ** exponent)) / 2`` at token t of T."""
    guidance_exponent: Annotated[_Positive, _PRIOR] = 1.0
    """Exponent of ``power-cosine``; above 1, the scale rises later."""
    guidance_interval: Annotated[tuple[float, float], Option(metavar=("FROM", "TO"), group=_PRIOR.group)] = Field(
        (0.0, 1.0), strict=False
    )
    """Positions of the first and the last guided token, as fractions of the token sequence."""

    decoder_temperature: Annotated[_Positive, _PIXELS] = 1.0
    """Sampling temperature, by which the logits are divided."""
    decoder_top_k: Annotated[int | None, _PIXELS] = Field(None, ge=1)
    """Sample from the k most probable codes only; default: all codes."""
    decoder_top_p: Annotated[float | None, _PIXELS] = Field(None, gt=0, le=1)
    """Sample from the fewest most probable codes whose probabilities sum to at least this; default: all codes."""
    steps: Annotated[int, _PIXELS] = Field(8, ge=1)
    """Number of iterations of a NAR decoder."""
    choice_temperature: Annotated[_Scale, _PIXELS] = 4.5
    """Weight of the Gumbel noise on the confidences of a NAR decoder; decreases to 0 over the steps."""

    @model_validator(mode="after")
    def _check(self) -> "DrawSettings":
        if self.count is not None and self.per_class is not None:
            raise ValueError(f"count is {self.count} and per_class is {self.per_class}, expected one of them")
        if not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval is {self.guidance_interval}, expected 0 <= first <= second <= 1")
        if self.guidance_exponent != 1 and self.guidance_schedule != "power-cosine":
            raise ValueError(
                f"guidance_exponent is {self.guidance_exponent}, but guidance_schedule is {self.guidance_schedule}, "
                "expected power-cosine"
            )
        return self

    @property
    def prior_decoding(self) -> Decoding:
        """How first-stage tokens are drawn."""
        guidance = Guidance(self.guidance, self.guidance_schedule, self.guidance_interval, self.guidance_exponent)
        return Decoding(self.temperature, self.top_k, self.top_p, guidance)

    @property
    def pixel_decoding(self) -> Decoding:
        """How a pixel decoder's VQ tokens are drawn."""
        decoder = (self.decoder_temperature, self.decoder_top_k, self.decoder_top_p)
        return Decoding(*decoder, steps=self.steps, choice_temperature=self.choice_temperature)


class SampleSettings(DrawSettings, ModelSettings):
    """Sample pictures: prior -> pixel decoder -> VQGAN; continues an interrupted job.

    Without ``--count`` or ``--per-class``, 4 pictures of each of the first 16 classes are sampled, or 64 if the prior
    has no classes.
    """

    # The models, the VQGAN and given pictures are recorded by their content, classes and precisions as they come out,
    # the options of drawing by ``Decoding.record``.
    NOT_RECORDED = frozenset(
        {
            *("out", "prior", "pixel_decoder", "vqgan", "vqgan_config", "count", "per_class", "classes", "batch"),
            *("precision", "vqgan_precision", "vqgan_compile", "adm_array"),
            *("temperature", "top_k", "top_p"),
            *("guidance", "guidance_schedule", "guidance_exponent", "guidance_interval"),
            *("decoder_temperature", "decoder_top_k", "decoder_top_p", "steps", "choice_temperature"),
            *("from_images", "encoder", "num_heads", "codebook", "resize", "from_tokens", "keep"),
        }
    )
    FIRST_RECORDED = frozenset({"seed"})

    out: PathText
    """Folder to write: images/, tokens.npz, grid.png, manifest.json."""
    adm_array: Annotated[bool, Option(name="npz")] = False
    """Also write samples.npz, the input format of ADM's evaluator."""
    from_images: Annotated[PathText | None, Option(metavar="DIR", group=_GIVEN)] = None
    """Pictures to reconstruct or, with ``--keep``, to complete."""
    labels: Annotated[PathText | None, Option(metavar="FILE", group=_GIVEN)] = None
    """Classes of pictures without class folders: Kaggle's LOC_val_solution.csv or ImageNet's devkit."""
    from_tokens: Annotated[PathText | None, Option(metavar="NPZ", group=_GIVEN)] = None
    """First-stage tokens to decode, such as tokens.npz of a sampling job."""
