"""The id layout, against the numbers that the published dictionaries give."""

import torch

from digit_ds.vocabulary import EOS, MASK, PAD, SPECIALS, Vocabulary


def test_special_ids_are_fairseqs():
    assert (PAD, EOS, MASK, SPECIALS) == (1, 2, 3, 5)


def test_class_conditional_prior():
    vocabulary = Vocabulary("prior", discriminative_codes=8192, classes=1000)
    assert vocabulary.output_size == 8197
    assert vocabulary.embedding_rows == 9197
    assert vocabulary.token(torch.tensor([0, 8191])).tolist() == [5, 8196]
    assert vocabulary.class_token(torch.tensor([0, 999])).tolist() == [8197, 9196]


def test_pixel_decoder_joint_table():
    vocabulary = Vocabulary("ar", discriminative_codes=8192, vq_codes=1024)
    assert vocabulary.output_size == 1029
    assert vocabulary.embedding_rows == 1029 + 8197
    assert vocabulary.prefix_token(torch.tensor([0, 8191])).tolist() == [1029 + 5, 1029 + 8196]
    assert vocabulary.code(vocabulary.token(torch.tensor([7]))).tolist() == [7]


def test_vq_baseline():
    assert Vocabulary("vq", discriminative_codes=0, vq_codes=1024).embedding_rows == 1029
