"""Codes to token sequences: masks, class tokens, prompts and what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from digit_ds.errors import UserError
from digit_ds.model.sequences import prompt_tokens, start_tokens, training_sequence
from digit_ds.model.spec import TransformerSpec
from digit_ds.vocabulary import EOS, MASK

PRIOR = TransformerSpec("prior", 1, 8, 2, 16, "post", 20, 9, 0, 3, grid=(2, 3))
NAR = TransformerSpec("nar", 1, 8, 2, 16, "pre", 20, 9, 7, 0, grid=(2, 3))
CODES = torch.arange(12).reshape(2, 6) % 7


def test_class_conditional_prior():
    made = training_sequence(PRIOR, CODES, None, torch.tensor([2, 0]))
    assert made.input.tolist() == [[16, 5, 6, 7, 8, 9, 10], [14, 11, 5, 6, 7, 8, 9]]
    assert made.target.tolist() == [[5, 6, 7, 8, 9, 10, 2], [11, 5, 6, 7, 8, 9, 2]]


def test_class_dropout_replaces_the_share_asked_for():
    codes, labels = CODES[:1].expand(4000, -1), torch.ones(4000, dtype=torch.int64)
    made = training_sequence(PRIOR, codes, None, labels, torch.Generator().manual_seed(0), class_dropout=0.2)
    assert set(made.input[:, 0].tolist()) == {EOS, 15}
    assert (made.input[:, 0] == EOS).float().mean().item() == pytest.approx(0.2, abs=0.03)


def test_nar_masks_the_published_number_of_positions_anywhere():
    batch = 3000
    codes = torch.zeros(batch, 6, dtype=torch.int64)
    made = training_sequence(NAR, codes, codes, None, torch.Generator().manual_seed(4))
    u = torch.rand((batch, 1), generator=torch.Generator().manual_seed(4)).squeeze(1)
    count = torch.tensor([min(6, math.floor(6 * math.cos(value * math.pi / 2) + 1)) for value in u.tolist()])
    assert torch.equal(made.loss_mask.sum(1), count)
    assert set(count.tolist()) == {1, 2, 3, 4, 5, 6}
    share = made.loss_mask[:, 1:].float().mean(0)  # every position as often as any other
    assert (share - share.mean()).abs().max() < 0.03
    assert torch.equal(made.input[:, 7:] == MASK, made.loss_mask[:, 1:])


def test_prompts():
    assert prompt_tokens(PRIOR, None, torch.tensor([1, 1, 0]), 3).tolist() == [[15], [15], [14]]
    assert prompt_tokens(PRIOR, None, None, 2).tolist() == [[EOS], [EOS]]
    joint = prompt_tokens(NAR, CODES, None, 2)
    assert joint[0].tolist() == [12 + 5 + code for code in range(6)] + [EOS]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: training_sequence(PRIOR, None, CODES, torch.tensor([0, 0])), "no discriminative tokens"),
        (lambda: training_sequence(NAR, CODES, None, None), "no VQ tokens"),
        (lambda: training_sequence(PRIOR, CODES[:, :4], None, None), r"have 4 discriminative tokens, expected 6 \(2x3"),
        (lambda: training_sequence(PRIOR, CODES + 5, None, None), r"discriminative code is 11, expected 0\.\.8"),
        (lambda: training_sequence(NAR, CODES, CODES - 1, None), r"VQ code is -1, expected 0\.\.6"),
        (lambda: start_tokens(PRIOR, torch.tensor([3]), 1), r"label is 3, expected 0\.\.2"),
        (lambda: start_tokens(PRIOR, torch.tensor([-1]), 1), r"label is -1, expected 0\.\.2"),
        (lambda: start_tokens(replace(PRIOR, classes=0), torch.tensor([0]), 1), "is unconditional"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
