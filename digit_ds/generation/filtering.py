"""From logits to one token: temperature, top-k, top-p and the draw.

Shapes: ``V`` vocabulary with the special ids in front, ``K`` codes = V minus those, any leading dimensions.
The conventions are fairseq's, as the published scripts use them: the softmax runs over the whole vocabulary, special
ids are then left out, and the remaining probabilities are *not* renormalised before top-p looks at their mass.
"""

import torch
from torch import Tensor

from digit_ds.vocabulary import SPECIALS


def code_log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits [..., V] -> log-probabilities [..., K] of the codes, in float32 or wider.

    No special id can ever be drawn from the result: end-of-image is a matter of counting, since each image has exactly
    as many tokens as its grid.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    return logits[..., SPECIALS:] - logits.logsumexp(-1, keepdim=True)


def candidates(
    log_probabilities: Tensor, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """What may be drawn: probabilities float64 [..., k], zero where removed, and their codes (None: 0 .. K-1).

    ``top_k`` keeps the k most probable codes, ``top_p`` the most probable ones up to and including the first at which
    their cumulative mass reaches p (everything, if it never does). With both, top-p looks at what top-k left.
    The codes stay in ascending order whatever their probabilities, so that rounding noise in two nearly equal logits
    moves a boundary of the cumulative distribution by that much instead of exchanging two whole intervals.
    """
    codes = None
    if top_k is not None and top_k < log_probabilities.shape[-1]:
        codes = log_probabilities.topk(top_k, sorted=False).indices.sort(-1).values
        log_probabilities = log_probabilities.gather(-1, codes)
    probabilities = log_probabilities.double().exp()
    if top_p is not None:
        descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
        mass_before = descending.cumsum(-1) - descending
        descending = descending.masked_fill(mass_before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, descending)
    return probabilities, codes


def draw(probabilities: Tensor, codes: Tensor | None, uniform: Tensor) -> Tensor:
    """Draw one code per row in proportion to ``probabilities`` [..., k] by inverting their cumulative sum.

    ``uniform`` float64 [...] in (0, 1). The same row and number give the same code on any device and in any batch,
    except when the number falls within rounding error of a boundary.
    """
    cumulative = probabilities.cumsum(-1)
    target = uniform[..., None] * cumulative[..., -1:]
    # The first entry that reaches a positive target has a probability above zero: removed codes are never hit.
    choice = torch.searchsorted(cumulative, target)
    return (choice if codes is None else codes.gather(-1, choice)).squeeze(-1)
