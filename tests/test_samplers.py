"""Sampling against the golden data, written-out references and itself at other batch sizes."""

import math

import numpy as np
import pytest
import torch
from golden_models import GOLDEN, golden_model
from scipy import stats

from digit_ds.errors import UserError
from digit_ds.generation.draws import PIXELS, PRIOR, gumbel, philox, philox_uniforms
from digit_ds.generation.filtering import candidates, draw
from digit_ds.generation.maskgit import MaskGitSampler, masked_again, masked_log_probabilities
from digit_ds.generation.samplers import AutoregressiveSampler, guide
from digit_ds.generation.settings import Decoding, Guidance
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import Transformer
from digit_ds.model.weights import initial_state
from digit_ds.vocabulary import EOS, MASK, SPECIALS

GREEDY = Decoding(top_k=1)


def load(path: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


# --- random numbers ---


def test_philox_gives_the_published_answers():
    """Known answers of Random123's ``kat_vectors`` for philox4x32-10."""
    ones = 0xFFFFFFFF
    vectors = [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in vectors:
        assert [int(word) for word in philox([torch.tensor(word) for word in counter], key)] == expected


def test_numbers_belong_to_the_image_and_differ_in_everything_else():
    numbers = philox_uniforms(3, torch.arange(100), PRIOR, 64)
    assert torch.equal(numbers[[17, 5]], philox_uniforms(3, torch.tensor([17, 5]), PRIOR, 64))
    assert torch.equal(numbers[:, :10], philox_uniforms(3, torch.arange(100), PRIOR, 10))
    others = [philox_uniforms(4, torch.arange(100), PRIOR, 64), philox_uniforms(3, torch.arange(100), PIXELS, 64)]
    others.append(philox_uniforms(3, torch.arange(100), PRIOR, 64, step=1))
    others.append(philox_uniforms(3, torch.arange(100) + 2**33, PRIOR, 64))
    values = torch.stack([numbers, *others])
    assert values.unique().numel() == values.numel()
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(gumbel(values).flatten().numpy(), "gumbel_r").pvalue > 1e-3


# --- filters and draws ---


@pytest.mark.parametrize("key", ["topp_0.3", "topp_0.8", "topp_0.999", "topp_300", "topk_1", "topk_20"])
def test_filters_equal_fairseqs(key):
    expected = load("sampling/expected.npz")
    kind, value = key.split("_")
    settings = {"top_k": int(value)} if kind == "topk" else {"top_p": float(value)}
    # The stored log-probabilities lack what the special ids had: one of them gets it back.
    logits = expected["lprobs"].double()
    logits[:, 0] = torch.log1p(-logits.exp().sum(-1))
    probabilities, codes = candidates(logits, **settings)
    if kind == "topk":  # without top-p the weights are known but for a factor
        probabilities *= (logits[:, SPECIALS:].amax(-1, keepdim=True)).exp()
    full = torch.zeros(expected["lprobs"].shape, dtype=torch.float64)
    if codes is None:
        full[:, SPECIALS:] = probabilities
    else:
        full.scatter_(1, codes + SPECIALS, probabilities)
    assert torch.equal(full > 0, expected[f"{key}_probs"] > 0)
    torch.testing.assert_close(full.float(), expected[f"{key}_probs"], atol=1e-6, rtol=1e-5)


def test_top_p_after_top_k_is_not_renormalised():
    logits = torch.tensor([[0.2, 0, 0, 0, 0, 0.3, 0.05, 0.25, 0.2]]).log()
    probabilities, codes = candidates(logits, top_k=3, top_p=0.5)
    assert codes.tolist() == [[0, 2, 3]]
    assert [round(p, 6) for p in probabilities[0].tolist()] == [0.3, 0.25, 0.0]


@pytest.mark.parametrize(
    "settings", [Decoding(), Decoding(top_k=7, temperature=0.7), Decoding(top_p=0.35, temperature=1.3)]
)
def test_draws_follow_the_filtered_distribution(settings):
    """Chi-square of 200,000 draws against probabilities written out in NumPy."""
    torch.manual_seed(0)
    logits = torch.randn(SPECIALS + 30) * 1.5
    logits[:SPECIALS] += 3  # special ids have most of the mass and must never come out
    tempered = logits.double().numpy() / settings.temperature
    expected = (np.exp(tempered) / np.exp(tempered).sum())[SPECIALS:]
    order = np.argsort(-expected)
    if settings.top_k:
        expected[order[settings.top_k :]] = 0
    if settings.top_p:
        reached = np.searchsorted(np.cumsum(expected[order]), settings.top_p) + 1
        expected[order[reached:]] = 0
    kept = np.count_nonzero(expected)
    assert kept == 30 if settings == Decoding() else 3 < kept < 20
    expected /= expected.sum()
    count = 200_000
    numbers = philox_uniforms(1, torch.arange(count), PRIOR, 1)[:, 0]
    rows = logits.expand(count, -1)
    drawn = draw(*candidates(rows, settings.temperature, settings.top_k, settings.top_p), numbers)
    counts = np.bincount(drawn.numpy(), minlength=30)
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], count * expected[expected > 0]).pvalue > 1e-3


# --- guidance ---


def test_guidance_scales():
    assert Guidance(3.0).scales(3) == [3.0, 3.0, 3.0]
    assert Guidance(3.0, "linear").scales(5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert Guidance(3.0, "cosine").scales(3) == pytest.approx([1.0, 2.0, 3.0])
    assert Guidance(3.0, interval=(0.25, 0.5)).scales(5) == [1.0, 3.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize(("scale", "exponent"), [(16.0, 2.75), (8.0, 1.2), (0.5, 1.0)])
def test_power_cosine_is_the_published_formula(scale, exponent):
    """Written out with PyTorch as RAR's sampler does it: the share of the way is step / tokens."""
    steps = torch.arange(256, dtype=torch.float64) / 256
    expected = (scale - 1) * (1 - torch.cos(steps**exponent * torch.pi)) / 2 + 1
    found = Guidance(scale, "power-cosine", exponent=exponent).scales(256)
    assert found == pytest.approx(expected.tolist(), rel=1e-12)
    assert found[0] == 1.0 and found[-1] == pytest.approx(scale, rel=1e-2)


def test_an_exponent_belongs_to_power_cosine():
    with pytest.raises(UserError, match=r"exponent is 2.0, but guidance schedule is 'cosine', expected power-cosine"):
        Guidance(3.0, "cosine", exponent=2.0)
    with pytest.raises(UserError, match=r"guidance exponent is 0, expected 1e-06 to"):
        Guidance(3.0, "power-cosine", exponent=0)
    with pytest.raises(UserError, match="constant, linear, cosine, power-cosine"):
        Guidance(3.0, "cubic")


@pytest.mark.parametrize(
    ("guidance", "scales"),
    [
        (Guidance(2.5, "linear", (0.0, 0.6)), [1 + 1.5 * t / 255 for t in range(24)]),
        (
            Guidance(9.0, "power-cosine", exponent=0.4),
            [5 - 4 * math.cos(math.pi * (t / 256) ** 0.4) for t in range(24)],
        ),
    ],
)
def test_guided_sampling_equals_a_full_forward_pass_written_out(guidance, scales):
    """Greedy tokens under a rising scale, each step recomputed without cache from conditional and unconditional
    logits."""
    model = golden_model("stage1_cond_postnorm", torch.float64)
    sampler = AutoregressiveSampler(model, Decoding(top_k=1, guidance=guidance), 0, PRIOR, rows=2)
    labels = torch.tensor([3, 998])
    codes = sampler(torch.arange(2), labels)
    vocabulary = model.spec.vocabulary
    written = codes[:, :24]
    tokens = vocabulary.token(written[:, :-1])
    conditional = model(torch.cat([vocabulary.class_token(labels)[:, None], tokens], 1)).numpy()
    unconditional = model(torch.cat([torch.full((2, 1), EOS), tokens], 1)).numpy()
    for position, scale in enumerate(scales):
        mixed = unconditional[:, position] + scale * (conditional[:, position] - unconditional[:, position])
        assert (mixed[:, SPECIALS:].argmax(-1) == written[:, position].numpy()).all()
    assert not torch.equal(codes, AutoregressiveSampler(model, GREEDY, 0, PRIOR, rows=2)(torch.arange(2), labels))


def test_guide():
    logits = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert guide(logits, 2.0).tolist() == [[2.0, 0.0]]


def test_unconditional_model_refuses_guidance():
    with pytest.raises(UserError, match="not class-conditional"):
        AutoregressiveSampler(
            golden_model("stage1_uncond_postnorm"), Decoding(guidance=Guidance(2.0)), 0, PRIOR, rows=1
        )


# --- golden decoding ---


@pytest.mark.parametrize("name", ["stage1_uncond_postnorm", "stage1_cond_postnorm", "stage2_ar", "stage2_vq"])
def test_greedy_decoding_is_the_golden_one_token_for_token(name):
    model, expected = golden_model(name), load(f"{name}/expected.npz")
    tokens = expected["greedy_tokens"]
    labels, prefix = None, None
    if name == "stage2_ar":
        prefix = expected["greedy_semantic_ids"] - SPECIALS
    elif model.spec.classes:
        labels = expected["greedy_start"] - model.spec.vocabulary.output_size
    sampler = AutoregressiveSampler(model, GREEDY, 0, PRIOR, rows=4)
    codes = sampler(torch.arange(len(tokens)), labels, prefix)
    assert torch.equal(codes[:, : tokens.shape[1]] + SPECIALS, tokens)


def test_parallel_decoding_replays_the_golden_one_token_for_token():
    model, golden = golden_model("stage2_nar"), load("stage2_nar/decode.npz")
    vocabulary, steps = model.spec.vocabulary, len(golden["drawn_ids"])
    prefix = vocabulary.prefix_token(golden["semantic_ids"] - SPECIALS)
    tokens = torch.full((2, 256), MASK)
    unknown = tokens == MASK
    at_first = unknown.sum(-1)
    for step in range(steps):
        logits = model(torch.cat([prefix, torch.full((2, 1), EOS), tokens], 1))[:, -256:]
        drawn = golden["drawn_ids"][step][:, 1:]
        tokens = torch.where(unknown, drawn, tokens)
        scores = masked_log_probabilities(logits).gather(-1, tokens[..., None] - SPECIALS).squeeze(-1)
        if step + 1 < steps:
            was_unknown = unknown
            noise = golden["gumbel"][step][:, 1:]
            unknown = masked_again(unknown, scores, noise, (step + 1) / steps, at_first, 4.5)
            tokens = tokens.masked_fill(unknown, MASK)
            kept = was_unknown & ~unknown
            torch.testing.assert_close(scores[kept], golden["scores_after_step"][step][:, 1:][kept], atol=1e-4, rtol=0)
        assert torch.equal(tokens, golden["tokens_after_step"][step][:, 1:])


def test_every_parallel_step_settles_a_token_and_leaves_one():
    unknown = torch.tensor([[True, True, False, True], [False, True, False, False]])
    scores = torch.tensor([[-2.0, -1.0, -9.0, -3.0], [0.0, -1.0, 0.0, 0.0]])
    left = masked_again(unknown, scores, torch.zeros(2, 4).double(), 0.01, torch.tensor([256, 256]), 4.5)
    assert left.tolist() == [[True, False, False, True], [False, True, False, False]]


def test_parallel_sampler_runs_the_schedule():
    """The sampler's own loop: the numbers of masked tokens in the model's input, and only codes at the end."""
    model = golden_model("stage2_nar", torch.float64)
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[0] == MASK).sum(-1)[0].item()))
    prefix = torch.randint(0, 96, (3, 256))
    known = torch.full((3, 256), -1)
    known[0, :200] = 7
    sampler = MaskGitSampler(model, Decoding(steps=8), 5, PIXELS, rows=3)
    codes = sampler(torch.arange(3)[[1, 2, 0]], prefix=prefix)
    assert seen == [256] + [math.floor(256 * math.cos(math.pi * step / 16)) for step in range(1, 8)]
    assert codes.min() >= 0 and codes.max() < model.spec.vq_codes
    seen.clear()
    completed = sampler(torch.arange(3), prefix=prefix, known=known)
    assert (completed[0, :200] == 7).all()
    assert seen == [56] + [math.floor(56 * math.cos(math.pi * step / 16)) for step in range(1, 8)]


# --- whose numbers ---


@pytest.mark.parametrize("kind", ["prior", "ar", "nar"])
def test_an_image_is_the_same_in_any_batch(kind):
    spec = TransformerSpec(
        kind, 2, 64, 2, 256, "pre", 64, 96, 0 if kind == "prior" else 40, 10 if kind == "prior" else 0, (4, 4)
    )
    model = Transformer(spec)
    model.load_state_dict(initial_state(spec, 1))
    model = model.double().eval()
    sampler_class = MaskGitSampler if kind == "nar" else AutoregressiveSampler
    decoding = Decoding(top_k=20, steps=4, guidance=Guidance(1.5 if model.spec.classes else 1.0))
    images = torch.arange(9) + 2**32
    prefix = torch.randint(0, 96, (9, 16)) if model.spec.prefix_length else None
    labels = torch.arange(9) if model.spec.classes else None

    def sample(rows: int, chosen: torch.Tensor) -> torch.Tensor:
        sampler = sampler_class(model, decoding, 11, PIXELS, rows)
        return sampler(images[chosen], *(None if part is None else part[chosen] for part in (labels, prefix)))

    together = sample(9, torch.arange(9))
    assert torch.equal(sample(4, torch.arange(9)), together)
    assert torch.equal(sample(1, torch.tensor([7])), together[[7]])
    shuffled = torch.tensor([3, 8, 0])
    assert torch.equal(sample(5, shuffled), together[shuffled])
    assert not torch.equal(sampler_class(model, decoding, 12, PIXELS, 9)(images, labels, prefix), together)


def test_known_tokens_are_kept_and_condition_the_rest():
    model = golden_model("stage1_uncond_postnorm", torch.float64)
    sampler = AutoregressiveSampler(model, GREEDY, 0, PRIOR, rows=2)
    known = torch.full((2, 256), -1)
    known[0, :250] = torch.arange(250) % 90
    codes = sampler(torch.arange(2), known=known)
    assert torch.equal(codes[0, :250], known[0, :250])
    tokens = torch.cat([torch.tensor([[EOS]]), codes[:1, :-1] + SPECIALS], 1)
    logits = model(tokens)[0, 250:, SPECIALS:]
    assert torch.equal(codes[0, 250:], logits.argmax(-1))
    assert torch.equal(codes[1], sampler(torch.arange(1))[0])
