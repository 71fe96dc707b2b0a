"""The key/value cache on a GPU: one kernel appends a token and attends to those before it, one norms and turns heads.

Decoding reads the whole cache once per token and does little with it, so the time is that of the memory traffic.
PyTorch's attention would read the unused end of the cache as well, and spend a tile of 64 or 128 queries on one; its
element-wise operations would take a dozen passes over queries and keys for QK-norm and rotary positions.

Shapes: ``B`` images, ``H`` heads, ``D`` width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from digit_ds.model.attention import NORM_EPSILON, KeyValueCache, QkNorm


class Launch(NamedTuple):
    """How the kernel is cut; fixed, never tuned at run time, since another block size adds up in another order."""

    block: int
    """Cached positions read at a time."""
    warps: int
    """Warps of a program."""
    stages: int
    """Blocks on their way from memory at once."""


LAUNCH = Launch(block=16, warps=1, stages=3)
"""The fastest of ``benchmarks/attention_speed.py`` on an H200 for heads of 64 and of 96 (2026-11-23)."""


@triton.jit
def _append_and_attend(
    qkv, keys, values, position, out, length, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for each image and head.

    ``qkv`` [B, 3D] grouped by head, ``keys`` and ``values`` [B, H, length, WIDTH], ``position`` [1], ``out`` [B, D].
    ``scale`` holds the factor log2(e): softmax is computed with powers of two.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, PADDED)
    inside = lane < WIDTH
    # Rows of qkv are image-major and, in an image, head-major, as are the programs: q, k, v of a row lie side by side.
    own = qkv + row * 3 * WIDTH + lane
    count = tl.load(position).to(tl.int32)
    query = tl.load(own, mask=inside, other=0.0).to(tl.float32) * scale
    new_key = tl.load(own + WIDTH, mask=inside, other=0.0)
    new_value = tl.load(own + 2 * WIDTH, mask=inside, other=0.0)
    keys += row.to(tl.int64) * length * WIDTH
    values += row.to(tl.int64) * length * WIDTH
    tl.store(keys + count * WIDTH + lane, new_key, mask=inside)
    tl.store(values + count * WIDTH + lane, new_value, mask=inside)

    # BLOCK softmaxes run side by side, one for each place in a block, and are joined at the end: until then no thread
    # waits for another.
    places = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    seen = tl.zeros([BLOCK, PADDED], tl.float32)
    for start in tl.range(0, count, BLOCK, num_stages=STAGES):
        live = start + places < count
        offsets = (start + places)[:, None] * WIDTH + lane[None, :]
        mask = live[:, None] & inside[None, :]
        key = tl.load(keys + offsets, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(live, tl.sum(key * query[None, :], axis=1), -1e30)
        higher = tl.maximum(highest, score)
        decay = tl.exp2(highest - higher)
        weight = tl.where(live, tl.exp2(score - higher), 0.0)
        total = total * decay + weight
        seen = seen * decay[:, None] + weight[:, None] * value
        highest = higher

    # The new token was never read back: it joins from its registers.
    new_score = tl.sum(query * new_key.to(tl.float32))
    top = tl.maximum(tl.max(highest), new_score)
    share = tl.exp2(highest - top)
    new_share = tl.exp2(new_score - top)
    numerator = tl.sum(seen * share[:, None], axis=0) + new_share * new_value.to(tl.float32)
    denominator = tl.sum(total * share) + new_share
    tl.store(out + row * WIDTH + lane, (numerator / denominator).to(out.dtype.element_ty), mask=inside)


def append_and_attend(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, launch: Launch = LAUNCH) -> Tensor:
    """Write one token's keys and values at ``position`` and attend to all up to it.

    Args:
        qkv: [B, 1, 3D], rows grouped by head.
        keys: [B, H, length, D / H]; changed, as ``values`` are.
        values: like ``keys``.
        position: int64 [1] on the device.
        launch: how to cut the work.

    Returns:
        [B, 1, D].
    """
    batch, heads, length, width = keys.shape
    out = torch.empty(batch, 1, heads * width, device=qkv.device, dtype=qkv.dtype)
    _append_and_attend[(batch * heads,)](
        qkv.contiguous(),
        keys,
        values,
        position,
        out,
        length,
        width**-0.5 * 1.4426950408889634,
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        BLOCK=launch.block,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    return out


@triton.jit
def _norm_and_turn(
    qkv, scale, turn, heads, tokens, epsilon,
    WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One program for each image, token and head.

    ``qkv`` [B, T, 3D] grouped by head, changed; ``scale`` [2, WIDTH]; ``turn`` [2, T, HALF], cosines and sines.
    Numbers j and j + HALF make a pair, which one thread reads and writes: none needs what another has overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    token = (row // heads) % tokens
    lane = tl.arange(0, PADDED)
    inside = lane < HALF
    for part in tl.static_range(2):  # query, key
        own = qkv + (row * 3 + part) * WIDTH + lane
        first = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(own + HALF, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            inverse = tl.rsqrt(tl.sum(first * first + second * second) / WIDTH + epsilon)
            first_scale = tl.load(scale + part * WIDTH + lane, mask=inside, other=0.0).to(tl.float32)
            second_scale = tl.load(scale + part * WIDTH + HALF + lane, mask=inside, other=0.0).to(tl.float32)
            first = first * inverse * first_scale
            second = second * inverse * second_scale
        if TURN:
            cosine = tl.load(turn + token * HALF + lane, mask=inside, other=0.0)
            sine = tl.load(turn + (tokens + token) * HALF + lane, mask=inside, other=0.0)
            turned = first * cosine - second * sine
            second = second * cosine + first * sine
            first = turned
        tl.store(own, first.to(qkv.dtype.element_ty), mask=inside)
        tl.store(own + HALF, second.to(qkv.dtype.element_ty), mask=inside)


class FusedCache(KeyValueCache):
    """A cache whose single steps run as one kernel a layer; prompts of several tokens attend in the general way."""

    def ready(self, qkv: Tensor, qk_norm: QkNorm | None, turn: Tensor | None) -> Tensor:
        """See :func:`digit_ds.model.attention.ready`; ``qkv`` itself is changed."""
        batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // (3 * self.heads)
        if (qk_norm is None and turn is None) or width % 2:  # an odd width has no halves
            return super().ready(qkv, qk_norm, turn)
        qkv = qkv.contiguous()
        _norm_and_turn[(batch * tokens * self.heads,)](
            qkv,
            qkv if qk_norm is None else qk_norm.weight,
            qkv if turn is None else turn,
            self.heads,
            tokens,
            NORM_EPSILON,
            WIDTH=width,
            HALF=width // 2,
            PADDED=triton.next_power_of_2(width // 2),
            NORM=qk_norm is not None,
            TURN=turn is not None,
            num_warps=1,
        )
        return qkv

    def attend(self, layer: int, qkv: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """See :meth:`KeyValueCache.attend`."""
        if qkv.shape[1] > 1:
            return super().attend(layer, qkv, positions, visible)
        return append_and_attend(qkv, self.keys[layer], self.values[layer], positions)
