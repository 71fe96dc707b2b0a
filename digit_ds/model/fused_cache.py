"""The key/value cache on a GPU: one kernel appends a token and attends to those before it.

Decoding reads the whole cache once per token and does little with it, so the time is that of the memory traffic.
PyTorch's attention would read the unused end of the cache as well, and spend a tile of 64 or 128 queries on one.

Shapes: ``B`` images, ``H`` heads, ``D`` width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from digit_ds.model.decoder import KeyValueCache

BLOCK = 64
"""Cached positions read at a time."""


@triton.jit
def _append_and_attend(
    qkv, keys, values, position, out, length, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each image and head.

    ``qkv`` [B, 3D] grouped by head, ``keys`` and ``values`` [B, H, length, WIDTH], ``position`` [1], ``out`` [B, D].
    """
    row = tl.program_id(0)
    lane = tl.arange(0, PADDED)
    inside = lane < WIDTH
    # Rows of qkv are image-major and, in an image, head-major, as are the programs: q, k, v of a row lie side by side.
    own = qkv + row * 3 * WIDTH + lane
    query = tl.load(own, mask=inside, other=0.0).to(tl.float32) * scale
    new_key = tl.load(own + WIDTH, mask=inside, other=0.0)
    new_value = tl.load(own + 2 * WIDTH, mask=inside, other=0.0)
    count = tl.load(position).to(tl.int32)
    start_of_row = row.to(tl.int64) * length * WIDTH
    tl.store(keys + start_of_row + count * WIDTH + lane, new_key, mask=inside)
    tl.store(values + start_of_row + count * WIDTH + lane, new_value, mask=inside)

    # BLOCK softmaxes run side by side, one for each place in a block, and are joined at the end: until then no thread
    # waits for another.
    places = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    seen = tl.zeros([BLOCK, PADDED], tl.float32)
    for start in range(0, count, BLOCK):
        places_now = start + places
        live = places_now < count
        offsets = start_of_row + places_now[:, None] * WIDTH + lane[None, :]
        mask = live[:, None] & inside[None, :]
        key = tl.load(keys + offsets, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(live, tl.sum(key * query[None, :], axis=1), -1e30)
        higher = tl.maximum(highest, score)
        decay = tl.exp(highest - higher)
        weight = tl.where(live, tl.exp(score - higher), 0.0)
        total = total * decay + weight
        seen = seen * decay[:, None] + weight[:, None] * value
        highest = higher

    # The new token was never read back: it joins from its registers.
    new_score = tl.sum(query * new_key.to(tl.float32))
    top = tl.maximum(tl.max(highest), new_score)
    share = tl.exp(highest - top)
    new_share = tl.exp(new_score - top)
    numerator = tl.sum(seen * share[:, None], axis=0) + new_share * new_value.to(tl.float32)
    denominator = tl.sum(total * share) + new_share
    result = numerator / denominator
    tl.store(out + row * WIDTH + lane, result.to(out.dtype.element_ty), mask=inside)


class FusedCache(KeyValueCache):
    """A cache whose single steps run as one kernel a layer; prompts of several tokens take the general way."""

    def attend(self, layer: int, qkv: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """See :meth:`KeyValueCache.attend`."""
        if qkv.shape[1] > 1:
            return super().attend(layer, qkv, positions, visible)
        batch, _, width = qkv.shape
        qkv = qkv.contiguous()
        head_width = width // 3 // self.heads
        out = torch.empty(batch, 1, width // 3, device=qkv.device, dtype=qkv.dtype)
        _append_and_attend[(batch * self.heads,)](
            qkv,
            self.keys[layer],
            self.values[layer],
            positions,
            out,
            self.length,
            head_width**-0.5,
            WIDTH=head_width,
            PADDED=triton.next_power_of_2(head_width),
            BLOCK=BLOCK,
        )
        return out
