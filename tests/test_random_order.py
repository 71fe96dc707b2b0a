"""Random orders of the tokens (RAR, arXiv 2411.00776): what is drawn, when, and what the recipe refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from calls import export
from small_models import small_spec
from training_parts import launch, metrics, recipe, train, write_shards

from digit_ds.config import load_recipe
from digit_ds.errors import UserError
from digit_ds.generation.draws import PRIOR
from digit_ds.generation.samplers import AutoregressiveSampler
from digit_ds.generation.settings import Decoding
from digit_ds.model.sequences import training_sequence
from digit_ds.model.transformer import load_model
from digit_ds.training.schedule import random_order_share

SPEC = replace(small_spec("prior"), target_positions=True)


def codes(images: int = 64) -> torch.Tensor:
    return torch.randint(SPEC.discriminative_codes, (images, SPEC.tokens), generator=torch.Generator().manual_seed(0))


def test_tokens_and_targets_follow_the_order_and_nothing_is_lost():
    given = codes()
    plain = training_sequence(SPEC, given, None, None)
    found = training_sequence(SPEC, given, None, None, torch.Generator().manual_seed(1), random_share=0.5)
    raster = torch.arange(SPEC.tokens)
    kept = (found.order == raster).all(1)
    assert 16 < int(kept.sum()) < 48  # about half
    assert torch.equal(found.order.sort(1).values, raster.expand(len(given), -1))
    assert torch.equal(found.input[kept], plain.input[kept])
    assert torch.equal(found.target[kept], plain.target[kept])
    restored = torch.empty_like(given).scatter_(1, found.order, found.input[:, 1:])
    assert torch.equal(restored, plain.input[:, 1:])
    assert torch.equal(found.target[:, :-1], found.input[:, 1:])  # each position is asked for the next one written
    assert torch.equal(found.target[:, -1], plain.target[:, -1])


def test_raster_order_draws_no_random_number():
    state = torch.get_rng_state()
    assert training_sequence(SPEC, codes(), None, None, random_share=0.0).order is None
    assert torch.equal(torch.get_rng_state(), state)


def test_the_share_falls_between_the_two_steps(tmp_path):
    values = recipe(tmp_path, tmp_path, training__order="random", training__order_anneal=(4, 8))
    assert [random_order_share(values, step) for step in range(3, 10)] == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    at_once = recipe(tmp_path, tmp_path, training__order="random", training__order_anneal=(4, 4))
    assert [random_order_share(at_once, step) for step in (3, 4)] == [1, 0]
    assert random_order_share(recipe(tmp_path, tmp_path), 0) == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.order=random"], "training.order_anneal is None, expected two steps"),
        (["training.order=random", "training.order_anneal=[9, 3]"], r"training.order_anneal is \[9, 3\]"),
        (["training.order_anneal=[1, 2]"], "training.order is raster"),
        (["training.order=random", "training.order_anneal=[1, 2]", "model.kind=ar"], "model.kind is ar"),
        (["training.order=shuffled"], "training.order is 'shuffled'"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, overrides, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run": "r", "data": {"shards": "s"}, "training": {"steps": 20}}))
    with pytest.raises(UserError, match=words):
        load_recipe(path, overrides)


@pytest.mark.slow
def test_a_run_resumes_exactly_and_its_release_samples_in_raster_order(tmp_path):
    """Stopped while orders are random, a run resumed on two ranks logs what the unbroken one does."""
    shards = write_shards(tmp_path / "shards")
    options = {"training__order": "random", "training__order_anneal": (3, 9), "training__steps": 12}
    options |= {"checkpoint__every": 5, "model__dropout": 0.1}
    launch(train, (recipe(tmp_path / "whole", shards, **options),), 1, tmp_path / "log")
    launch(train, (recipe(tmp_path / "broken", shards, **{**options, "training__steps": 5}),), 1, tmp_path / "log")
    launch(train, (recipe(tmp_path / "broken", shards, **options),), 2, tmp_path / "log2")
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "broken"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    export(tmp_path / "whole", tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.float64)
    assert model.spec.target_positions
    labels = torch.tensor([0, 2])
    drawn = AutoregressiveSampler(model, Decoding(top_k=1), 0, PRIOR, rows=2)(torch.tensor([0, 1]), labels)
    vocabulary = model.spec.vocabulary
    logits = model(torch.cat([vocabulary.class_token(labels)[:, None], vocabulary.token(drawn)], 1))[:, :-1]
    first = int(vocabulary.token(torch.zeros(1, dtype=torch.int64)))
    assert torch.equal(logits[..., first : first + model.spec.discriminative_codes].argmax(-1), drawn)


def test_the_shipped_recipes_anneal_as_published():
    for name in ("rar_base_prior", "rar_class_conditional_base_prior"):
        values = load_recipe(Path(__file__).parents[1] / "ds_configs" / f"{name}.yaml")
        first, last = values.training.order_anneal
        assert (first, last) == (values.training.steps // 2, values.training.steps * 3 // 4)
