"""Triton kernels of the exact GPU assignment (see exact.py for the algorithm) and of the update.

Legend: `n` points, `D` width, `Dp` width padded to whole steps, `K` codes padded to whole tiles, `T` tiles of `GROUP`
codes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from digit_ds.clustering.bounds import GROUP, STEP


@dataclass(frozen=True)
class Recheck:
    """How the recheck is scheduled; the default was the fastest of ``benchmarks/kmeans_speed.py``."""

    rows: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 24  # of each tile


RECHECK = Recheck()


@dataclass(frozen=True)
class Maxima:
    """How the tile maxima are scheduled, in blocks of ``rows`` x ``codes``; the default was the fastest."""

    rows: int = 128
    codes: int = 256
    warps: int = 8
    stages: int = 3
    persistent: bool = True


MAXIMA = Maxima()
_RUN = 64  # sorted points that one program adds up


@triton.jit
def maxima_of_tiles(scores, ROWS: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr):
    """Largest of each ``GROUP`` of scores [ROWS, CODES]."""
    return tl.max(tl.reshape(scores, (ROWS, CODES // GROUP, GROUP)), axis=2)  # [ROWS, CODES / GROUP]


@triton.jit
def descriptor_maxima_kernel(
    points, centroids, bias, maxima, n, tiles, blocks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """Largest score of each tile of codes, fp32 [n, T], of fp16 points [n, Dp] and centroids [K, Dp].

    Each program takes every ``num_programs``-th block.
    """
    columns_of_blocks = tiles // (CODES // GROUP)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), flatten=FLATTEN):
        first_row = (block // columns_of_blocks) * ROWS
        first_code = (block % columns_of_blocks) * CODES
        products = tl.zeros((ROWS, CODES), tl.float32)
        for column in range(0, WIDTH, STEP):
            left = points.load([first_row, column])
            right = centroids.load([first_code, column])
            products = tl.dot(left, right.T, products)
        codes = first_code + tl.arange(0, CODES)
        best = maxima_of_tiles(products + tl.load(bias + codes)[None, :], ROWS, CODES, GROUP)
        rows = first_row + tl.arange(0, ROWS)
        out = first_code // GROUP + tl.arange(0, CODES // GROUP)
        tl.store(maxima + rows.to(tl.int64)[:, None] * tiles + out[None, :], best, mask=rows[:, None] < n)


@triton.jit
def select_kernel(
    maxima, residuals, lengths, radius, slack, constant, relative, lists, counts, n, capacity, tiles,
    TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Append each point to the lists of the tiles that may hold its nearest centroid, given the error bounds."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.arange(0, TILES)
    row_there = rows < n
    tile_there = tile < tiles
    there = row_there[:, None] & tile_there[None, :]
    best = tl.load(maxima + rows.to(tl.int64)[:, None] * tiles + tile[None, :], mask=there, other=-1e30)
    residual = tl.load(residuals + rows, mask=row_there, other=0.0)
    length = tl.load(lengths + rows, mask=row_there, other=0.0)
    error = residual[:, None] * tl.load(radius + tile, mask=tile_there, other=0.0)[None, :]
    error += length[:, None] * tl.load(slack + tile, mask=tile_there, other=0.0)[None, :]
    error += tl.load(constant + tile, mask=tile_there, other=0.0)[None, :] + relative * tl.abs(best)
    certain = tl.max(best - error, axis=1)
    flags = ((best + error >= certain[:, None]) & there).to(tl.int32)
    found = tl.sum(flags, axis=0)
    base = tl.atomic_add(counts + tile, found, mask=found > 0)
    place = base[None, :] + tl.cumsum(flags, axis=0) - flags
    tl.store(lists + tile.to(tl.int64)[None, :] * capacity + place, rows[:, None], mask=flags > 0)


@triton.jit
def recheck_kernel(
    points, high, low, bias, order, lists, counts, keys, pair_keys, pair_seconds, capacity, width, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Nearly fp32 scores of the listed points against their tiles: best and second of each pair, best of each point.

    fp32 numbers are split into two fp16 halves; three products sum to theirs but for 2^-22. Every step is summed
    on its own and then added in fp32, because tensor cores cut off what a long running sum cannot hold.
    """
    tile = tl.program_id(0)
    count = tl.load(counts + tile)
    lists += tile.to(tl.int64) * capacity
    pair_keys += tile.to(tl.int64) * capacity
    pair_seconds += tile.to(tl.int64) * capacity
    code_places = tl.arange(0, GROUP)
    codes = tile * GROUP + code_places
    for start in range(tl.program_id(1) * ROWS, count, PROGRAMS * ROWS):
        slots = start + tl.arange(0, ROWS)
        there = slots < count
        rows = tl.load(lists + slots, mask=there, other=0).to(tl.int64)
        scores = tl.zeros((ROWS, GROUP), tl.float32)
        for column in range(0, WIDTH, STEP):
            columns = column + tl.arange(0, STEP)
            exact = tl.load(points + rows[:, None] * width + columns[None, :], mask=columns[None, :] < width, other=0.0)
            exact = exact * factor
            left_high = exact.to(tl.float16)
            left_low = (exact - left_high.to(tl.float32)).to(tl.float16)
            right_high = tl.load(high + codes[None, :] * WIDTH + columns[:, None])
            right_low = tl.load(low + codes[None, :] * WIDTH + columns[:, None])
            part = tl.dot(left_low, right_high)
            part = tl.dot(left_high, right_low, part)
            part = tl.dot(left_high, right_high, part)
            scores = scores + part
        scores = scores + tl.load(bias + codes)[None, :]
        best = tl.max(scores, axis=1)
        place = tl.argmax(scores, axis=1)
        second = tl.max(tl.where(code_places[None, :] == place[:, None], -1e30, scores), axis=1)
        code = tl.load(order + tile * GROUP + place)
        bits = best.to(tl.int32, bitcast=True)
        # Signed whole numbers in the order of the scores; below them the code, the lowest first.
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - code).to(tl.int64)
        tl.atomic_max(keys + rows, key, mask=there)
        tl.store(pair_keys + slots, key, mask=there)
        tl.store(pair_seconds + slots, second, mask=there)


@triton.jit
def _score_in(key):
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def doubt_kernel(
    lists, counts, keys, pair_keys, pair_seconds, lengths, doubts, capacity, per_length, constant,
    ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Mark the points whose best two scores are closer than the recheck's error bound."""
    tile = tl.program_id(0)
    count = tl.load(counts + tile)
    offset = tile.to(tl.int64) * capacity
    for start in range(tl.program_id(1) * ROWS, count, PROGRAMS * ROWS):
        slots = start + tl.arange(0, ROWS)
        there = slots < count
        rows = tl.load(lists + offset + slots, mask=there, other=0)
        winner = tl.load(keys + rows, mask=there, other=0)
        key = tl.load(pair_keys + offset + slots, mask=there, other=0)
        second = tl.load(pair_seconds + offset + slots, mask=there, other=-1e30)
        contender = tl.where(key == winner, second, _score_in(key))
        error = tl.load(lengths + rows, mask=there, other=0.0) * per_length + constant
        tl.store(doubts + rows, 1, mask=there & (contender + 2 * error >= _score_in(winner)))


@triton.jit
def segment_sum_kernel(points, order, codes, sums, n, width, scale, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Add points, taken in the order of their sorted ``codes``, to fixed-point ``sums`` int64 [K, D]."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    start = tl.program_id(0) * LENGTH
    current = tl.load(codes + start).to(tl.int64)
    total = tl.zeros((COLUMNS,), tl.int64)
    for place in range(start, tl.minimum(start + LENGTH, n)):
        code = tl.load(codes + place).to(tl.int64)
        row = tl.load(order + place).to(tl.int64)
        units = (tl.load(points + row * width + columns, mask=inside, other=0.0) * scale).to(tl.int64)
        if code != current:
            tl.atomic_add(sums + current * width + columns, total, mask=inside)
            total = tl.zeros((COLUMNS,), tl.int64)
        total += units
        current = code
    tl.atomic_add(sums + current * width + columns, total, mask=inside)


def tile_maxima(
    halves: torch.Tensor, centroids: torch.Tensor, bias: torch.Tensor, maxima: torch.Tensor, schedule: Maxima = MAXIMA
) -> None:
    """Fill ``maxima`` fp32 [n, T]; ``halves`` fp16 [n, Dp], ``centroids`` fp16 [K, Dp], ``bias`` fp32 [K]."""
    n, tiles = maxima.shape
    blocks = triton.cdiv(n, schedule.rows) * (centroids.shape[0] // schedule.codes)
    processors = torch.cuda.get_device_properties(halves.device).multi_processor_count
    descriptor_maxima_kernel[(min(blocks, processors) if schedule.persistent else blocks,)](
        TensorDescriptor.from_tensor(halves, [schedule.rows, STEP]),
        TensorDescriptor.from_tensor(centroids, [schedule.codes, STEP]),
        bias, maxima, n, tiles, blocks, WIDTH=halves.shape[1], ROWS=schedule.rows, CODES=schedule.codes, STEP=STEP,
        GROUP=GROUP, FLATTEN=schedule.persistent, num_warps=schedule.warps, num_stages=schedule.stages,
    )  # fmt: skip


def add_points_sorted(
    sums: torch.Tensor, counts: torch.Tensor, points: torch.Tensor, codes: torch.Tensor, scale: float
) -> None:
    """``fixed_point.add_points`` for CUDA tensors: sort by code, then add runs of equal codes."""
    narrow = codes.to(torch.int16) if len(sums) <= 1 << 15 else codes.to(torch.int32)
    ordered, order = narrow.sort()
    places = torch.arange(len(sums) + 1, dtype=torch.int32, device=sums.device)
    counts += torch.searchsorted(ordered.to(torch.int32), places).diff()
    grid = (triton.cdiv(len(points), _RUN), triton.cdiv(points.shape[1], 256))
    segment_sum_kernel[grid](
        points, order, ordered, sums, len(points), points.shape[1], scale, LENGTH=_RUN, COLUMNS=256, num_warps=2
    )
