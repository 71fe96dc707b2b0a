"""MaskGIT-style parallel decoding: all tokens at once, the least certain ones again in the next step.

Shapes: ``R`` rows, ``G`` tokens of an image, ``K`` codes, ``V`` vocabulary.
"""

import math

import torch
from torch import Tensor

from digit_ds.generation.draws import CONFIDENCE, gumbel, philox_uniforms
from digit_ds.generation.filtering import candidates, draw, wide
from digit_ds.generation.samplers import Sampler
from digit_ds.vocabulary import MASK, SPECIALS


class MaskGitSampler(Sampler):
    """Iterative decoding with a non-causal (NAR) pixel decoder, as published: cosine schedule of the number of masked
    tokens, confidence = log-probability of the drawn token plus Gumbel noise that fades out over the steps.
    """

    def _sample(self, images: Tensor, labels: Tensor | None, prefix: Tensor | None, known: Tensor) -> Tensor:
        decoding = self.decoding
        images, codes = images.to(self.device), known.to(self.device)
        prompts = self._prompts(labels, prefix)
        unknown = codes < 0
        at_first = unknown.sum(-1)
        for step in range(decoding.steps):
            tokens = self.spec.vocabulary.token(codes).masked_fill(unknown, MASK)
            logits = self.model(torch.cat([prompts, tokens], dim=1))[:, -self.spec.tokens :]
            numbers = philox_uniforms(self.seed, images, self.purpose, self.spec.tokens, step)
            drawn = draw(*candidates(logits, decoding.temperature, decoding.top_k, decoding.top_p), numbers)
            codes = torch.where(unknown, drawn, codes)
            if step + 1 < decoding.steps:
                scores = masked_log_probabilities(logits).gather(-1, codes[..., None]).squeeze(-1)
                noise = gumbel(philox_uniforms(self.seed, images, CONFIDENCE, self.spec.tokens, step))
                unknown = masked_again(
                    unknown, scores, noise, (step + 1) / decoding.steps, at_first, decoding.choice_temperature
                )
        return codes


def masked_log_probabilities(logits: Tensor) -> Tensor:
    """Logits [..., V] -> log-probabilities [..., K] with the special ids excluded before the softmax, as published."""
    return wide(logits[..., SPECIALS:]).log_softmax(-1)


def masked_again(
    unknown: Tensor, scores: Tensor, noise: Tensor, ratio: float, at_first: Tensor, choice_temperature: float
) -> Tensor:
    """Which positions are masked for the next step.

    Args:
        unknown: bool [R, G], masked in this step.
        scores: [R, G] log-probabilities of the tokens drawn in it.
        noise: float64 [R, G], standard Gumbel.
        ratio: share of the steps done.
        at_first: int64 [R], masked positions before the first step.
        choice_temperature: weight of the noise at the start.

    Returns:
        bool [R, G]: the least confident of ``unknown``, as many as the cosine schedule asks for, at least one fewer
        than now.
    """
    confidence = scores.double().masked_fill(~unknown, math.inf) + choice_temperature * (1 - ratio) * noise
    now = unknown.sum(-1)
    scheduled = torch.floor(at_first * math.cos(math.pi * ratio / 2)).long()
    count = torch.minimum(scheduled, now - 1).clamp(min=1)
    rank = confidence.argsort(dim=-1, stable=True).argsort(-1)
    return unknown & (rank < count[:, None])
