"""The training loss on whole logits: what ``digit_ds/model/vocabulary_loss.py`` is compared with."""

import torch
from torch import Tensor


def label_smoothed_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Label-smoothed cross entropy and plain negative log-likelihood, both means in nats.

    The smoothing mass is spread evenly over all V entries, the target included (the published criterion, and
    ``torch.nn.functional.cross_entropy(label_smoothing=...)``). Computed in float32 whatever the logits' dtype.

    Args:
        logits: [..., T, V].
        target: int64 [..., T].
        smoothing: share of the mass that is spread, 0..1.
        mask: bool [..., T]; the mean is over its true positions. None: all.

    Returns:
        ``loss, nll``, both 0-d float32.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    nll = -log_probabilities.gather(-1, target.unsqueeze(-1)).squeeze(-1)  # [..., T]
    uniform = -log_probabilities.mean(dim=-1)
    if mask is None:
        nll, uniform = nll.mean(), uniform.mean()
    else:
        # Multiplying keeps the shapes static; indexing by a mask would wait for the device.
        weight = mask.to(nll.dtype) / mask.sum()
        nll, uniform = (nll * weight).sum(), (uniform * weight).sum()
    return (1.0 - smoothing) * nll + smoothing * uniform, nll
