"""Workers hand over what they loaded through shared memory: nothing is overwritten while it may be in use."""

import os
import time
from collections import deque

import numpy as np
import pytest
from calls import extract_features, tokenize_images
from preparation_parts import make_images

from digit_ds.data.images import Crops, decode
from digit_ds.errors import UserError
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


@pytest.mark.parametrize("decoder", ["gpu", "cpu"])
@pytest.mark.parametrize("given", [None, "4"])
def test_streams_get_queues_before_a_network_comes_to_the_gpu(tmp_path, monkeypatch, decoder, given):
    """nvJPEG's kernels wait behind the encoder's otherwise; nothing changes it once CUDA has started."""
    name, missing = "CUDA_DEVICE_MAX_CONNECTIONS", tmp_path / "missing.pth"
    expected = given or ("32" if decoder == "gpu" else None)
    for job in (extract_features, tokenize_images):
        monkeypatch.setenv(name, given) if given else monkeypatch.delenv(name, raising=False)
        others = (missing, None) if job is tokenize_images else ()
        with pytest.raises(UserError, match="missing"):  # reading the encoder comes next
            job(tmp_path, missing, *others, tmp_path / "out", decoder=decoder)
        assert os.environ.get(name) == expected
