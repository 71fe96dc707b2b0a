"""From logits to one token: temperature, top-k, top-p and the draw.

Shapes: ``V`` vocabulary with the special ids in front, ``K`` codes = V minus those, any leading dimensions.
The conventions are fairseq's, as the published scripts use them: the softmax runs over the whole vocabulary, special
ids are then left out, and the remaining probabilities are *not* renormalised before top-p is applied.
"""

import torch
from torch import Tensor

from digit_ds.vocabulary import SPECIALS


def candidates(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """What may be drawn from logits [..., V], in proportion to what, and as which codes (None: 0 .. K-1).

    ``top_k`` keeps the k most probable codes, ``top_p`` the most probable ones up to and including the first at which
    their cumulative mass reaches p (all codes, if it never does). With both, top-p is applied to the codes that top-k
    keeps.
    No special id is among the candidates: the end of an image is a matter of counting, since each has exactly as many
    tokens as its grid.

    The codes stay in ascending order whatever their probabilities, so that rounding noise in two nearly equal logits
    moves a boundary of the cumulative distribution by that much instead of exchanging two whole intervals.

    Returns:
        Weights float64 [..., k], zero where removed (with ``top_p`` they are the probabilities), and codes [..., k].
    """
    kept, codes = logits[..., SPECIALS:], None
    if top_k is not None and top_k < kept.shape[-1]:
        codes = kept.topk(top_k, sorted=False).indices.sort(-1).values
        kept = kept.gather(-1, codes)
    # Only top-p needs normalised probabilities, special ids counted; for the draw a factor does not matter.
    largest = kept.amax(-1, keepdim=True)
    kept = wide(kept) / temperature
    if top_p is None:
        return (kept - wide(largest) / temperature).double().exp(), codes
    weights = (kept - (wide(logits) / temperature).logsumexp(-1, keepdim=True)).double().exp()
    descending, order = weights.sort(dim=-1, descending=True, stable=True)
    mass_before = descending.cumsum(-1) - descending
    descending = descending.masked_fill(mass_before >= top_p, 0.0)
    return torch.zeros_like(weights).scatter(-1, order, descending), codes


def wide(logits: Tensor) -> Tensor:
    """At least float32: halves are too coarse to add up."""
    return logits if logits.dtype == torch.float64 else logits.float()


def draw(weights: Tensor, codes: Tensor | None, uniform: Tensor) -> Tensor:
    """Draw one code per row in proportion to ``weights`` [..., k] by inverting their cumulative sum.

    ``uniform`` float64 [...] in (0, 1). The same row and number give the same code on any device and in any batch,
    except when the number falls within rounding error of a boundary.
    """
    cumulative = weights.cumsum(-1)
    target = uniform[..., None] * cumulative[..., -1:]
    # The first entry that reaches a positive target has a weight above zero: removed codes are never hit.
    choice = torch.searchsorted(cumulative, target)
    return (choice if codes is None else codes.gather(-1, choice)).squeeze(-1)
