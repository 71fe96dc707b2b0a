"""The lean transformer against the published code's numbers, and against a plain reference at other sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import from_official
from reference_loss import label_smoothed_cross_entropy
from small_models import MODERN_LAYERS, random_ids

from digit_ds.errors import UserError
from digit_ds.model.released import save_model
from digit_ds.model.sequences import training_sequence
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import Transformer, load_model
from digit_ds.model.weights import initial_state
from digit_ds.vocabulary import EOS, MASK, SPECIALS

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = [
    "stage1_uncond_postnorm",
    "stage1_uncond_prenorm",
    "stage1_cond_postnorm",
    "stage2_ar",
    "stage2_nar",
    "stage2_vq",
]
CAUSAL = [name for name in VARIANTS if name != "stage2_nar"]
INPUT = {"stage2_ar": "decoder_input", "stage2_nar": "decoder_input"}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Variant -> the golden checkpoint as a released model, converted once."""
    made = {}

    def convert(variant: str) -> Transformer:
        if variant not in made:
            directory = tmp_path_factory.mktemp("released") / variant
            from_official(GOLDEN / variant / "checkpoint_last.pt", directory)
            made[variant] = load_model(directory)
        return made[variant]

    return convert


def expected(variant: str, name: str = "expected") -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / variant / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def largest_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return (found.double() - wanted.double()).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss_are_the_published_ones(released, variant):
    model, want = released(variant), expected(variant)
    logits = model(want[INPUT.get(variant, "src_tokens")])
    assert largest_difference(logits, want["logits"]) <= 1e-4
    target = want["target"]
    loss, nll = label_smoothed_cross_entropy(logits[:, -target.shape[1] :], target, 0.1, want.get("loss_mask"))
    assert largest_difference(loss, want["loss"]) <= 1e-5
    assert largest_difference(nll, want["nll_loss"]) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_sequences_are_the_published_ones(released, variant):
    spec, want = released(variant).spec, expected(variant)
    tokens = want[INPUT.get(variant, "src_tokens")]
    target = want["target"][:, 1:] if spec.kind == "nar" else want["target"][:, :-1]
    written = target - SPECIALS
    prefix = tokens[:, : spec.prefix_length] - spec.vocabulary.prefix_token(torch.tensor(0))
    made = training_sequence(
        spec,
        discriminative=written if spec.kind == "prior" else prefix,
        vq=written,
        labels=want.get("cls_ids"),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(made.target, want["target"])
    if spec.kind == "nar":
        masked = made.input[:, spec.prefix_length + 1 :] == MASK
        assert torch.equal(made.loss_mask[:, 1:], masked) and not made.loss_mask[:, 0].any()
        assert torch.equal(made.input[:, : spec.prefix_length + 1], tokens[:, : spec.prefix_length + 1])
        assert torch.equal(made.input[:, -spec.tokens :][~masked], made.target[:, 1:][~masked])
    else:
        assert torch.equal(made.input, tokens) and made.loss_mask is None


@pytest.mark.parametrize("variant", CAUSAL)
@torch.inference_mode()
def test_greedy_decoding_with_the_cache_is_token_for_token(released, variant):
    model, want = released(variant), expected(variant)
    if variant == "stage2_ar":
        prefix = want["greedy_semantic_ids"] + model.spec.vocabulary.output_size
        start = torch.full((len(prefix), 1), EOS)
    else:
        prefix = None
        start = want["greedy_start"].unsqueeze(1)
    cache = model.new_cache(len(start), model.spec.sequence_length)
    if prefix is not None:
        model.step(prefix, cache)
    token, tokens, logits = start, [], []
    for _ in range(want["greedy_tokens"].shape[1]):
        last = model.step(token, cache)[:, -1]
        logits.append(last.clone())
        last[:, :SPECIALS] = -torch.inf
        token = last.argmax(-1, keepdim=True)
        tokens.append(token)
    assert torch.equal(torch.cat(tokens, 1), want["greedy_tokens"])
    assert largest_difference(torch.stack(logits, 1), want["greedy_logits"]) <= 1e-4


@torch.inference_mode()
def test_parallel_decoding_replays_the_published_steps(released):
    """The published re-masking update, written out here, driven by the recorded draws."""
    model, want = released("stage2_nar"), expected("stage2_nar", "decode")
    prefix = want["semantic_ids"] + model.spec.vocabulary.output_size
    steps, batch, length = want["drawn_ids"].shape
    tokens = torch.full((batch, length), MASK)
    tokens[:, 0] = EOS
    scores = torch.zeros(batch, length)
    for step in range(steps):
        logits = model(torch.cat([prefix, tokens], 1))[:, -length:]
        logits[..., :SPECIALS] = -torch.inf
        unknown = tokens == MASK
        drawn = want["drawn_ids"][step]
        log_probability = logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        tokens = torch.where(unknown, drawn, tokens)
        scores = torch.where(unknown, log_probability, scores)
        if step < steps - 1:
            ratio = (step + 1) / steps
            certain = torch.where(unknown, log_probability, torch.inf)
            confidence = certain + 4.5 * (1 - ratio) * want["gumbel"][step]
            hidden = int(unknown[0].sum())
            count = max(1, min(hidden - 1, int((length - 1) * np.cos(np.pi * ratio / 2))))
            least = confidence.argsort(1)[:, :count]
            tokens.scatter_(1, least, MASK)
            scores.scatter_(1, least, 0.0)
        assert torch.equal(tokens, want["tokens_after_step"][step])
        assert largest_difference(scores, want["scores_after_step"][step]) <= 1e-4


@pytest.mark.parametrize("norm", ["postnorm", "prenorm"])
def test_probe_features_are_the_published_ones(released, norm):
    want = expected("linear_probe")
    model = released(f"stage1_uncond_{norm}")
    states = model.hidden_states(want["src_tokens"])
    assert len(states) == model.spec.layers + 1
    features = torch.stack([state.mean(1) for state in states[: model.spec.layers]])
    assert largest_difference(features, want[f"features_{norm}"]) <= 1e-4
    assert largest_difference(model.output(model.norm(states[-1])), model(want["src_tokens"])) == 0


@pytest.mark.parametrize("smoothing", ["0", "0.1"])
@pytest.mark.parametrize("positions", ["all", "masked"])
def test_the_criterion_alone(positions, smoothing):
    want = expected("criterion")
    mask = want["mask"] if positions == "masked" else None
    loss, nll = label_smoothed_cross_entropy(want["logits"], want["target"], float(smoothing), mask)
    assert largest_difference(loss, want[f"loss_{positions}_{smoothing}"]) <= 1e-5
    assert largest_difference(nll, want[f"nll_{positions}"]) <= 1e-5


SPEC = TransformerSpec("prior", 2, 24, 3, 40, "pre", 30, 11, 0, 4, grid=(3, 4))


@pytest.mark.parametrize("kind", ["prior", "ar", "vq"])
@pytest.mark.parametrize("chunks", [(5, 1, 1, 3), (1, 9)])
@pytest.mark.parametrize("options", [{}, MODERN_LAYERS], ids=["published", "modern"])
@torch.inference_mode()
def test_the_cache_equals_a_full_pass_in_any_chunks(kind, chunks, options):
    grid = (2, 3) if kind == "ar" or not options else (3, 4)  # rotary positions end with the grid
    spec = TransformerSpec(kind, 2, 24, 3, 40, "post", 30, 11, 7, 0, grid=grid, **options)
    model = Transformer(spec).eval()
    model.load_state_dict(initial_state(spec, 3))
    tokens = random_ids(spec, 2, sum(chunks))
    cache = model.new_cache(2, sum(chunks) + 2)
    for _ in range(2):  # the second time in the same memory
        steps = torch.cat([model.step(part, cache) for part in tokens.split(chunks, dim=1)], dim=1)
        assert largest_difference(steps, model(tokens)) <= 1e-5
        with pytest.raises(ValueError, match="3 tokens after 10 exceed the cache of 12"):
            model.step(tokens[:, :3], cache)
        cache.reset()


def test_what_a_caller_may_get_wrong_is_one_sentence(tmp_path):
    save_model(tmp_path / "model", SPEC, initial_state(SPEC, 0), {})
    model = load_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"token id is 20, expected 0\.\.19"):
        model(torch.tensor([[2, 20]]))
    for bare in (torch.tensor([[2, 5], [4, 3]]), torch.tensor([[2, 5], [8, 16]])):  # the second row, codes or code ids
        with pytest.raises(
            UserError, match=r"the id [48] at position 0, expected the start token 2 or a class token 16 "
        ):
            model(bare)
    assert model(torch.tensor([[2, 5], [16, 15]])).shape == (2, 2, 16)
    with pytest.raises(UserError, match="has 31 tokens, expected at most 30 for this prior"):
        model(torch.zeros(1, 31, dtype=torch.int64))
    turning = Transformer(TransformerSpec("ar", 1, 8, 2, 16, "pre", 1, 9, 7, 0, grid=(3, 4), positions="rotary2d"))
    with pytest.raises(UserError, match="has 26 tokens, expected at most 25 for this ar"):
        turning(torch.zeros(1, 26, dtype=torch.int64))
    prefix = torch.full((1, 12), 17)  # the first discriminative code of a table behind 5 special ids and 7 VQ codes
    for wrong, message in (
        (torch.arange(9)[None], "the id 0 in its prefix of 12 discriminative tokens, expected 17 or more"),
        (torch.cat([prefix, torch.tensor([[7]])], dim=1), "the id 7 at position 12, expected the start token 2; "),
    ):
        with pytest.raises(UserError, match=message):
            turning(wrong)
    far = Transformer(TransformerSpec("ar", 1, 8, 2, 16, "pre", 11, 9, 7, 0, grid=(3, 4)))
    with pytest.raises(UserError, match="has 12 tokens, expected at most 11 for this ar"):
        far(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="no cache"):
        Transformer(TransformerSpec("nar", 1, 8, 2, 16, "pre", 20, 9, 7, 0, grid=(3, 4))).new_cache(1, 5)
    with pytest.raises(UserError, match="already holds a model"):
        save_model(tmp_path / "model", SPEC, initial_state(SPEC, 0), {})
    with pytest.raises(UserError, match="does not exist, expected a model directory"):
        load_model(tmp_path / "nowhere")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or truncated"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 48}, "has shape .* expected .* by its config"),
        ({"layers": 3}, "'layers.2.attention.out.bias' is missing"),
        ({"layers": 1}, "'layers.1.attention.out.bias' does not belong to this model"),
        ({"norm_position": "post"}, "'norm.bias' does not belong to this model"),
    ],
)
def test_weights_of_another_config_are_refused(tmp_path, change, sentence):
    save_model(tmp_path / "model", SPEC, initial_state(SPEC, 0), {})
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    values["spec"].update(change)
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match=sentence):
        load_model(tmp_path / "model")


def test_half_precision_weights_load_exactly(tmp_path):
    state = {name: value.half() for name, value in initial_state(SPEC, 0).items()}
    save_model(tmp_path / "model", SPEC, state, {})
    model = load_model(tmp_path / "model")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
