"""Workers hand over what they loaded through shared memory: nothing is overwritten while it may be in use."""

import time
from collections import deque

import numpy as np
import pytest
from preparation_parts import make_images

from digit_ds.data.images import Crops, decode
from digit_ds.preparation import loading
from digit_ds.preparation.jobs import Job
from digit_ds.preparation.loading import HELD, Loading

VIEWS = 2 * 32 * 32 * 3  # bytes of one image's views


@pytest.mark.parametrize("room", [2 * VIEWS, 2 * VIEWS - 1, VIEWS - 1])  # both images of a piece fit, one, none
def test_batches_keep_their_pixels_while_they_are_held(tmp_path, monkeypatch, room):
    monkeypatch.setattr(loading, "PIECE", 2)
    monkeypatch.setattr(Loading, "_piece_bytes", room)
    images, crops = make_images(tmp_path / "images", 45), Crops("training", 32, 32, 2, 0)
    job = Job(tmp_path / "out", images, {}, 20)
    held, seen = deque(), []
    for batch in Loading(crops, 12, 2).batches(job, [0, 1, 2]):
        held.append(batch)
        if len(held) < HELD and not (batch.block == 2 and batch.last):
            continue
        time.sleep(0.02)  # the workers go on meanwhile
        while len(held) >= HELD or (held and batch.block == 2 and batch.last):
            oldest = held.popleft()
            seen += oldest.numbers
            for name, views in zip(oldest.names, oldest.data, strict=True):
                assert np.array_equal(views.numpy(), crops.cut(decode(images / name), name)), name
    assert seen == list(range(45))
