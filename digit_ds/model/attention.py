"""Attention of the lean transformer: its cache, how heads are laid out, QK norm.

Shapes: ``B`` images, ``T`` tokens, ``t`` new tokens, ``D`` width, ``H`` heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from digit_ds.model.rotary import rotate, rotation
from digit_ds.model.spec import TransformerSpec

NORM_EPSILON = 1e-5


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3D], grouped by head -> query, key and value, each [B, H, T, D / H]."""
    query, key, value = qkv.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
    return query, key, value


def join_heads(attended: Tensor) -> Tensor:
    """[B, H, T, D / H] -> [B, T, D]."""
    return attended.transpose(1, 2).flatten(2)


class QkNorm(nn.Module):
    """RMSNorm of each head's query and key; row 0 of the weight scales queries, row 1 keys, of all heads alike."""

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, spec.head_width))

    def forward(self, qk: Tensor) -> Tensor:
        """[B, T, H, 2, D / H], queries and keys, to the same shape."""
        return functional.rms_norm(qk, qk.shape[-1:], eps=NORM_EPSILON) * self.weight


def ready(qkv: Tensor, heads: int, qk_norm: QkNorm | None, turn: Tensor | None) -> Tensor:
    """QK norm and rotary positions of queries and keys: [B, T, 3D], grouped by head, to the same.

    ``turn`` is :func:`digit_ds.model.rotary.rotation` of these T positions.
    """
    if qk_norm is None and turn is None:
        return qkv
    qk, value = qkv.unflatten(-1, (heads, 3, -1)).split((2, 1), dim=-2)  # [B, T, H, 2 and 1, D / H]
    if qk_norm is not None:
        qk = qk_norm(qk)
    if turn is not None:
        qk = rotate(qk, turn)
    return torch.cat([qk, value], dim=-2).flatten(2)


class KeyValueCache:
    """Keys and values of the tokens processed so far, allocated once for ``length`` tokens.

    No tensor changes its shape or address, and the position is on the device, so that a step of the transformer can be
    captured in a CUDA graph and replayed.

    Args:
        spec: the transformer's specification; gives the number of layers, the heads and their width W.
        batch: number of sequences B.
        length: largest number of tokens of a sequence, prefix included.
        device: device of all tensors.
        dtype: floating-point type of keys and values, that of the transformer's weights.

    Attributes:
        keys, values: a tensor [B, heads, length, W] of ``dtype`` for each layer; zeros at positions not yet written.
    """

    def __init__(self, spec: TransformerSpec, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (batch, spec.heads, length, spec.head_width)
        self.length, self.heads = length, spec.heads
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(spec.layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(spec.layers)]
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        """int64 [1]: number of tokens processed, that is the position of the next one."""
        self.rotation = rotation(spec, torch.arange(length, device=device), dtype)
        """Of every position of the cache, as :meth:`Attention.step` needs it; None: the model has position tables."""

    def reset(self) -> None:
        """Empty the cache; its memory is reused."""
        self.position.zero_()

    def ready(self, qkv: Tensor, qk_norm: QkNorm | None, turn: Tensor | None) -> Tensor:
        """:func:`ready`, which may write into ``qkv``."""
        return ready(qkv, self.heads, qk_norm, turn)

    def attend(self, layer: int, qkv: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Write the keys and values of t new tokens to a layer's cache and attend to it.

        Args:
            layer: number of the layer, from 0.
            qkv: [B, t, 3D] from :meth:`ready`, grouped by head.
            positions: int64 [t], where the new tokens are written.
            visible: bool [t, length], the positions of the cache to which each new token attends.

        Returns:
            Output of the heads, [B, t, D].
        """
        query, key, value = split_heads(qkv, self.heads)
        self.keys[layer].index_copy_(2, positions, key)
        self.values[layer].index_copy_(2, positions, value)
        seen = functional.scaled_dot_product_attention(query, self.keys[layer], self.values[layer], attn_mask=visible)
        return join_heads(seen)


class Attention(nn.Module):
    """Multi-head self-attention; the rows of ``qkv`` are grouped by head (q, k, v of head 0, then of head 1, ...)."""

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        self.heads = spec.heads
        self.causal = spec.causal
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.qk_norm = QkNorm(spec) if spec.qk_norm else None
        self.out = nn.Linear(spec.width, spec.width)

    def forward(self, hidden: Tensor, turn: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D] over all positions; ``turn`` as in :func:`ready`."""
        qkv = ready(self.qkv(hidden), self.heads, self.qk_norm, turn)
        query, key, value = split_heads(qkv, self.heads)
        return self.out(join_heads(functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)))

    def step(
        self,
        hidden: Tensor,
        turn: Tensor | None,
        layer: int,
        cache: KeyValueCache,
        positions: Tensor,
        visible: Tensor,
    ) -> Tensor:
        """[B, t, D] -> [B, t, D]: new tokens of this layer; the rest as in :meth:`KeyValueCache.attend`."""
        qkv = cache.ready(self.qkv(hidden), self.qk_norm, turn)
        return self.out(cache.attend(layer, qkv, positions, visible))
