"""The order of samples: which image and view stands at a position of the endless sequence of epochs.

Every epoch has every image once, in an order drawn from (seed, epoch); image ``i`` is shown as its view
``(first(i) + epoch) mod views``. A position is all there is to resume from.

Orders are computed, not stored: an epoch's order is a keyed bijection of 0..n-1, a Feistel network (Luby and Rackoff
1988) over the smallest power of two that holds n, walked along its cycle until it falls below n (Black and Rogaway
2002). So a loading process holds a few numbers a shard, whatever the number of images. With a bounded cache the shards
of an epoch come in a random order, ``window`` of them at a time, and images are shuffled within a window: each shard is
fetched about once an epoch.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

_MASK = 2**64 - 1
_ROUNDS = 8


class Order(Protocol):
    """Positions in the sequence -> image numbers and views."""

    def places(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Image numbers and views at positions: two arrays of whole numbers, [N] each."""


class Bijection:
    """A random-looking permutation of 0..size-1 that is computed for the numbers asked; equal for equal ``key``."""

    def __init__(self, size: int, *key: int) -> None:
        self._size = np.uint64(size)
        bits = max(2, (size - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._low_mask, self._high_mask = (np.uint64(2**part - 1) for part in (bits // 2, bits - bits // 2))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Where ``numbers``, whole and below ``size`` [N], go: uint64 [N]."""
        found = self._once(numbers.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self._size)).size:
            found[outside] = self._once(found[outside])
        return found

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        high, low = numbers >> self._low, numbers & self._low_mask
        for turn, key in enumerate(self._keys):
            if turn % 2:
                high = (high + _mixed(low ^ key)) & self._high_mask
            else:
                low = (low + _mixed(high ^ key)) & self._low_mask
        return high << self._low | low


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, uint64 -> uint64; the high half of its bits is used."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)  # arrays wrap at 2**64
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (numbers ^ numbers >> np.uint64(31)) >> np.uint64(16)


class InOrder:
    """Images in their own order, view 0: validation."""

    def __init__(self, images: int) -> None:
        self._images = images

    def places(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Image numbers and views at positions."""
        images = np.asarray(positions, np.int64) % self._images
        return images, np.zeros_like(images)


class KeyedOrder:
    """Computed bijections.

    Args:
        images: number of images.
        views: views of each, stored one after the other: sample ``image x views + view``.
        seed: of all orders and of each image's first view.
        samples: of each shard in turn; needed with ``window``.
        window: shards between which images are shuffled; None: all.
    """

    def __init__(
        self, images: int, views: int, seed: int, samples: Sequence[int] = (), window: int | None = None
    ) -> None:
        self._images, self._views, self._seed, self._window = images, views, seed, window
        self._first_view = Bijection(images, seed, -1)
        self._ends = np.cumsum(np.asarray(samples, np.int64))
        self._epochs: dict[int, _Epoch] = {}

    def places(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Image numbers and views at positions."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self._images)
        images, views = np.empty_like(offsets), np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            images[here] = self._epoch(epoch).images(offsets[here])
            views[here] = self._view(images[here], epoch)
        return images, views

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:  # a batch may hold the end of one epoch and the start of the next
            self._epochs = {known: made for known, made in self._epochs.items() if known == epoch - 1}
            self._epochs[epoch] = _Epoch(self._windows(epoch), self._images, self._seed, epoch)
        return self._epochs[epoch]

    def _view(self, images: np.ndarray, epoch: int) -> np.ndarray:
        return (self._first_view(images).astype(np.int64) + epoch) % self._views

    def _windows(self, epoch: int) -> list[np.ndarray]:
        """Of each window in turn, its ranges of images, [shards, 2]: those whose sample of this epoch lies there."""
        if self._window is None:
            return [np.array([[0, self._images]])]
        # The views of one image may lie in two shards: it belongs to the one with the view that is shown.
        images, views = np.divmod(self._ends, self._views)
        inside = views > 0
        images[inside] += self._view(images[inside], epoch) < views[inside]
        ranges = np.stack([np.r_[0, images[:-1]], images], 1)
        order = Bijection(len(ranges), self._seed, epoch, -1)(np.arange(len(ranges)))
        return [ranges[order[at : at + self._window]] for at in range(0, len(ranges), self._window)]


class _Epoch:
    """The windows of one epoch, each shuffled by a bijection of its own."""

    def __init__(self, windows: list[np.ndarray], images: int, seed: int, epoch: int) -> None:
        self._windows, self._key = windows, (seed, epoch)
        self._ends = np.cumsum([_lengths(ranges).sum() for ranges in windows])
        assert self._ends[-1] == images, "shards and manifest disagree on the number of images"
        self._shuffles: dict[int, tuple[Bijection, np.ndarray]] = {}

    def images(self, offsets: np.ndarray) -> np.ndarray:
        """Images at offsets of the epoch."""
        found, windows = np.empty_like(offsets), np.searchsorted(self._ends, offsets, side="right")
        for window in np.unique(windows).tolist():
            here = windows == window
            first = 0 if window == 0 else self._ends[window - 1]
            shuffle, ends = self._shuffle(window)
            inside = shuffle(offsets[here] - first).astype(np.int64)
            part = np.searchsorted(ends, inside, side="right")
            found[here] = self._windows[window][part, 1] - ends[part] + inside
        return found

    def _shuffle(self, window: int) -> tuple[Bijection, np.ndarray]:
        if window not in self._shuffles:
            ends = np.cumsum(_lengths(self._windows[window]))
            self._shuffles = {known: made for known, made in self._shuffles.items() if known == window - 1}
            self._shuffles[window] = Bijection(int(ends[-1]), *self._key, window), ends
        return self._shuffles[window]


def _lengths(ranges: np.ndarray) -> np.ndarray:
    return ranges[:, 1] - ranges[:, 0]


class StoredOrder:
    """The order of runs that were begun before it was computed: NumPy's permutation, a number for each image."""

    def __init__(self, images: int, views: int, seed: int) -> None:
        self._images, self._views, self._seed = images, views, seed
        self._orders: dict[int, np.ndarray] = {}
        self._first_view = _narrow(_permutation(seed, -1, images) % views, views)

    def places(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Image numbers and views at positions."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self._images)
        images = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            images[here] = self._order(epoch)[offsets[here]]
        return images, (self._first_view[images].astype(np.int64) + epochs) % self._views

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = _narrow(_permutation(self._seed, epoch, self._images), self._images)
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]


def _permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of the images in an epoch (epoch -1: what the first views are drawn from)."""
    return np.random.Generator(np.random.Philox(key=[seed & _MASK, epoch + 1])).permutation(images)


def _narrow(numbers: np.ndarray, end: int) -> np.ndarray:
    """Numbers below ``end`` in as few bytes as they need: every loading process holds them for all images."""
    return numbers.astype(np.min_scalar_type(end - 1))
