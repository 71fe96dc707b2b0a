"""How tokens are drawn: one record for the autoregressive and for the parallel sampler."""

import math
from dataclasses import dataclass
from typing import Literal

from digit_ds.errors import UserError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a class-conditional prior.

    The logits become ``unconditional + scale * (conditional - unconditional)``; 1 is no guidance. The prior must have
    been trained with ``training.class_dropout``, which is what teaches it the unconditional start.
    """

    scale: float = 1.0
    """Scale at its highest."""
    schedule: Schedule = "constant"
    """``linear`` and ``cosine`` rise from 1 at the first token to ``scale`` at the last."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Share of the way through the image (first token 0, last 1) between which guidance acts, ends included."""

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise UserError(f"guidance scale is {self.scale}, expected 0 or more (1: no guidance)")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"guidance schedule is {self.schedule!r}, expected constant, linear or cosine")
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
            rise = {"constant": 1.0, "linear": way, "cosine": (1 - math.cos(math.pi * way)) / 2}[self.schedule]
            inside = self.interval[0] <= way <= self.interval[1]
            scales.append(1 + (self.scale - 1) * rise if inside else 1.0)
        return scales


@dataclass(frozen=True)
class Decoding:
    """How one model's tokens are drawn. The published settings: top-k 200 (base) or 400 (large) for priors, top-p 0.8
    for an autoregressive pixel decoder, 8 steps with choice temperature 4.5 for a parallel one.
    """

    temperature: float = 1.0
    """Divides the logits."""
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

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature}, expected a number above 0 (greedy decoding is top-k 1)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}, expected at least 1")
        if self.top_p is not None and self.top_p <= 0:
            raise UserError(f"top-p is {self.top_p}, expected a number above 0")
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, expected at least 1")
        if self.choice_temperature < 0:
            raise UserError(f"choice temperature is {self.choice_temperature}, expected 0 or more")
