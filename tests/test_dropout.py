"""Dropout masks are functions of key, row and column, the same at every layout."""

import pytest
import torch
from training_parts import launch, metrics, recipe, train, write_shards

from digit_ds.model.dropout import draw_keys, dropout, keep_mask


def lowbias32(x: int) -> int:
    """As published, in whole numbers."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_mask_is_the_published_hash():
    torch.manual_seed(0)
    (key,) = draw_keys(1, torch.device("cpu"))
    first, second = (int(k) % 2**32 for k in key)
    expected = [
        [
            lowbias32(((lowbias32(row ^ first) ^ second) + column * 0x9E3779B9) % 2**32) ^ 2**31 >= 0.3 * 2**32
            for column in range(50)
        ]
        for row in range(40)
    ]
    # The highest bit is the sign: flipped, the order of the signed numbers is that of the unsigned ones.
    assert keep_mask(key, 40, 50, 0, 0.3).tolist() == expected


def test_masks_are_independent():
    torch.manual_seed(1)
    keys = draw_keys(6, torch.device("cpu"))
    masks = torch.stack([keep_mask(key, 512, 256, 0, 0.1) for key in keys]).double()
    count = masks[0].numel()
    assert masks.mean((1, 2)).sub(0.9).abs().max() < 4 * (0.09 / count) ** 0.5
    assert masks.mean(1).sub(0.9).abs().max() < 5 * (0.09 / 512) ** 0.5  # no column is dropped more often
    assert masks.mean(2).sub(0.9).abs().max() < 5 * (0.09 / 256) ** 0.5  # no row either
    normal = (masks - 0.9) / 0.3
    shifts = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 16), (16, 0), (128, 0), (0, 128)]
    for down, right in shifts:
        moved = normal.roll((down, right), (1, 2))
        correlation = torch.einsum("irc,jrc->ij", normal, moved) / count
        if (down, right) == (0, 0):
            correlation.fill_diagonal_(0)
        assert correlation.abs().max() < 5 * count**-0.5, (down, right)


def test_what_is_kept_is_scaled():
    torch.manual_seed(2)
    (key,) = draw_keys(1, torch.device("cpu"))
    x = torch.randn(64, 32, requires_grad=True)
    y = dropout(x, 0.25, key)
    kept = keep_mask(key, 64, 32, 0, 0.25)
    torch.testing.assert_close(y, x * kept / 0.75)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)
    parts = [dropout(x[start : start + 16], 0.25, key, start) for start in range(0, 64, 16)]
    assert torch.equal(torch.cat(parts), y)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    shards = write_shards(folder / "shards")
    return shards, losses(folder / "run", shards, 1)


def losses(run, shards, ranks: int, **options) -> list[float]:
    values = recipe(run, shards, model__dropout=0.2, training__steps=6, checkpoint__every=6, **options)
    launch(train, (values,), ranks, run.with_suffix(".log"), timeout=600)
    return [value for line in metrics(run) for value in (line["loss"], line["grad_norm"])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "data", "options"),
    [
        (1, 1, {"training__compile": True, "training__recompute": "layer"}),
        (2, 1, {"parallel__sequence": True, "training__compile": True}),
        (2, 2, {"parallel__sequence": True, "training__recompute": "layer", "deepspeed": "zero3.json"}),
    ],
)
def test_layouts_drop_the_same_elements(tensor, data, options, plain, tmp_path):
    shards, expected = plain
    found = losses(tmp_path / "run", shards, tensor * data, parallel__tensor=tensor, **options)
    assert found == pytest.approx(expected, rel=1e-5)
