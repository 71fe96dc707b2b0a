"""RMSNorm, rotary positions, SwiGLU, QK-norm, random order: each by its formula, and the same in the training model."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from calls import to_official
from reference_loss import label_smoothed_cross_entropy
from small_models import MODERN_LAYERS, random_ids
from training_parts import launch

from digit_ds.config import ModelConfig
from digit_ds.errors import UserError
from digit_ds.model.released import save_model
from digit_ds.model.spec import Architecture, TransformerSpec
from digit_ds.model.transformer import Transformer, load_model
from digit_ds.model.weights import initial_state, shard, unshard

PLAIN = TransformerSpec("prior", 2, 24, 2, 40, "pre", 30, 11, 0, 4, grid=(2, 3))
CASES = {name: replace(PLAIN, **{name: value}) for name, value in MODERN_LAYERS.items()}
CASES |= {"prior": replace(PLAIN, **MODERN_LAYERS), "post": replace(PLAIN, norm_position="post", **MODERN_LAYERS)}
CASES |= {
    kind: replace(PLAIN, kind=kind, vq_codes=7, classes=0, discriminative_codes=codes, **MODERN_LAYERS)
    for kind, codes in (("ar", 11), ("nar", 11), ("vq", 0))
}
CASES |= {"order": replace(PLAIN, target_positions=True), "vq order": replace(CASES["vq"], target_positions=True)}


def some_state(spec: TransformerSpec) -> dict[str, torch.Tensor]:
    """Weights in which no scale is 1 and no bias 0, so that each of them shows."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in initial_state(spec, 3).items()
    }


def some_tokens(spec: TransformerSpec, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return random_ids(spec, batch, generator=generator)


def some_order(spec: TransformerSpec, batch: int = 2) -> torch.Tensor | None:
    """An order of its own for each image, for the models that have one."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(batch, spec.tokens, generator=generator).argsort(1) if spec.target_positions else None


def places(spec: TransformerSpec) -> list[tuple[int, int]]:
    """Where each token of a sequence stands: the start at the corner, the grid from (1, 1) on, twice after a prefix."""
    grid = [(row, column) for row in range(1, spec.grid[0] + 1) for column in range(1, spec.grid[1] + 1)]
    return [*(grid if spec.kind in ("ar", "nar") else []), (0, 0), *grid]


def reference(
    spec: TransformerSpec, state: dict[str, torch.Tensor], tokens: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """The transformer with its options from their formulas, token by token and head by head, in float64."""
    if order is not None:  # image by image: each has its tokens at places of its own
        both = zip(tokens, order.tolist())
        return torch.cat([in_order(spec, state, own[None], own_order) for own, own_order in both])
    return in_order(spec, state, tokens, list(range(spec.tokens)))


def in_order(spec, state, tokens, order: list[int]) -> torch.Tensor:
    weights = {name: value.double() for name, value in state.items()}
    size, epsilon = spec.width // spec.heads, 1e-5

    def rms(x, scale):
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * scale

    def norm(x, name):
        if spec.normalization == "rms":
            return rms(x, weights[f"{name}.weight"])
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def turned(x):  # [B, T, size]: complex numbers of one head, multiplied by exp(i angle)
        numbers = torch.complex(x[..., : size // 2], x[..., size // 2 :])
        known = places(spec)
        begin = len(known) - spec.tokens  # the prefix and the start token stand where they are
        for t, place in enumerate(known[:begin] + [known[begin + place] for place in order]):
            for axis in (0, 1):
                for k in range(size // 4):
                    angle = torch.tensor(place[axis] * 10000.0 ** (-k / (size // 4)), dtype=torch.float64)
                    numbers[:, t, axis * (size // 4) + k] *= torch.complex(angle.cos(), angle.sin())
        return torch.cat([numbers.real, numbers.imag], dim=-1)

    def attention(x, name):
        fused, heads = linear(x, f"{name}.qkv"), []
        for head in range(spec.heads):
            q, k, v = (fused[..., (3 * head + part) * size : (3 * head + part + 1) * size] for part in range(3))
            if spec.qk_norm:
                q, k = rms(q, weights[f"{name}.qk_norm.weight"][0]), rms(k, weights[f"{name}.qk_norm.weight"][1])
            if spec.positions == "rotary2d":
                q, k = turned(q), turned(k)
            score = q @ k.transpose(1, 2) / size**0.5
            if spec.kind != "nar":
                score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
            heads.append(score.softmax(-1) @ v)
        return linear(torch.cat(heads, dim=-1), f"{name}.out")

    def ffn(x, name):
        if spec.activation == "gelu":
            h = linear(x, f"{name}.up")
            return linear(0.5 * h * (1 + torch.erf(h / 2**0.5)), f"{name}.down")
        both = linear(x, f"{name}.gate_up")
        gate, up = both[..., 0::2], both[..., 1::2]
        return linear(gate / (1 + (-gate).exp()) * up, f"{name}.down")

    x = spec.width**0.5 * weights["embedding.weight"][tokens]
    if spec.positions == "learned":
        x = x + weights["positions.weight"][[2, *(3 + place for place in order)]]
    if spec.target_positions:
        x = x + torch.cat([weights["target_positions.weight"][order], x.new_zeros(1, spec.width)])
    for i in range(spec.layers):
        name = f"layers.{i}"
        if spec.norm_position == "pre":
            x = x + attention(norm(x, f"{name}.attention_norm"), f"{name}.attention")
            x = x + ffn(norm(x, f"{name}.ffn_norm"), f"{name}.ffn")
        else:
            x = norm(x + attention(x, f"{name}.attention"), f"{name}.attention_norm")
            x = norm(x + ffn(x, f"{name}.ffn"), f"{name}.ffn_norm")
    return (norm(x, "norm") if spec.norm_position == "pre" else x) @ weights["output.weight"].T


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_the_formulas_are_what_is_computed(case):
    spec = CASES[case]
    state, tokens = some_state(spec), some_tokens(spec)
    model = Transformer(spec).double().eval()
    model.load_state_dict(state)
    expected = reference(spec, state, tokens)
    assert expected.std() > 0.5
    assert (model(tokens) - expected).abs().max() <= 1e-10
    if (order := some_order(spec)) is not None:
        shuffled = reference(spec, state, tokens, order)
        assert (shuffled - expected).abs().mean() > 0.1
        assert (model(tokens, order) - shuffled).abs().max() <= 1e-10


def compare_on_two_ranks(out: Path) -> None:
    """Logits, loss and gradients of every case in the training model, cut for two ranks, written down by each rank."""
    from digit_ds.model.megatron import MegatronTransformer
    from digit_ds.parallel import topology

    place = topology.initialize(2, 60)
    found = {}
    for case, spec in CASES.items():
        model = MegatronTransformer(spec, recompute="layer" if case == "prior" else "none", smoothing=0.1)
        model.load_state_dict(shard(some_state(spec), spec, 2, place.tensor_rank))
        tokens = some_tokens(spec)
        target = tokens[:, -spec.tokens :] % spec.vocabulary.output_size
        found[case] = {"logits": model(tokens, order=some_order(spec)).detach()}
        loss, _ = model(tokens, target, order=some_order(spec))
        loss.backward()
        found[case]["loss"] = loss.detach()
        found[case] |= {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save(found, out / f"{place.tensor_rank}.pt")
    topology.finish()


@pytest.mark.slow
def test_the_training_model_is_the_lean_model_on_two_ranks(tmp_path):
    launch(compare_on_two_ranks, (tmp_path,), 2, tmp_path / "log")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for case, spec in CASES.items():
        parts = [found[case] for found in ranks]
        model = Transformer(spec)
        model.load_state_dict(some_state(spec))
        tokens, size = some_tokens(spec), spec.vocabulary.output_size
        logits = model(tokens, some_order(spec))
        found = torch.cat([part.pop("logits") for part in parts], dim=-1)[..., :size]
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=2e-5, msg=lambda text, c=case: f"{c}: {text}")
        loss, _ = label_smoothed_cross_entropy(logits[:, -spec.tokens :], tokens[:, -spec.tokens :] % size, 0.1)
        assert [part.pop("loss").item() for part in parts] == pytest.approx([loss.item()] * 2, rel=1e-6)
        loss.backward()
        gradients = unshard(parts, spec)  # refuses replicated parameters whose gradients differ between the ranks
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                gradients[name],
                parameter.grad,
                rtol=1e-4,
                atol=1e-6,
                msg=lambda text, n=f"{case} {name}": f"{n}: {text}",
            )


def test_a_slice_of_the_fused_gate_holds_pairs():
    spec = CASES["prior"]
    state = initial_state(spec, 1)
    gate, up = state["layers.0.ffn.gate_up.weight"].unflatten(0, (-1, 2)).unbind(1)
    part = shard(state, spec, 2, 1)
    own = slice(spec.ffn_width // 2, spec.ffn_width)
    assert torch.equal(part["layers.0.ffn.gate_up.weight"][0::2], gate[own])
    assert torch.equal(part["layers.0.ffn.gate_up.weight"][1::2], up[own])
    assert torch.equal(part["layers.0.ffn.down.weight"], state["layers.0.ffn.down.weight"][:, own])


def test_rotary_scores_know_the_distance_alone():
    """The same query and key, moved together over the grid, give one score; moved apart, along either axis, another."""
    from digit_ds.model.rotary import rotate, rotation

    spec = replace(PLAIN, width=64, heads=1, grid=(5, 7), **MODERN_LAYERS)
    vector = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = rotation(spec, torch.arange(spec.sequence_length), torch.float64)
    query, key = rotate(vector.expand(1, spec.sequence_length, 1, 2, 64), turn)[0, :, 0].unbind(1)
    score = query @ key.T

    def at(row, column):  # sequence position of a grid place
        return 1 + row * 7 + column

    assert score[at(4, 6), at(3, 4)] == pytest.approx(float(score[at(1, 2), at(0, 0)]), rel=1e-12)
    assert score[0, 0] == pytest.approx(float(vector[0] @ vector[1]), rel=1e-12)
    others = [score[at(1, 2), at(1, 0)], score[at(1, 2), at(0, 1)], score[at(1, 1), at(0, 3)], score[0, at(0, 0)]]
    assert all(abs(float(other - score[at(1, 2), at(0, 0)])) > 1e-3 for other in others)


def test_a_config_from_before_the_options_is_the_published_architecture(tmp_path):
    save_model(tmp_path / "model", PLAIN, initial_state(PLAIN, 0), {})
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    for name in (*MODERN_LAYERS, "target_positions"):
        del values["spec"][name]
    config.write_text(json.dumps(values))
    assert load_model(tmp_path / "model").spec == PLAIN
    del values["spec"]["heads"]
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match="key 'heads' is missing"):
        load_model(tmp_path / "model")


def test_a_modern_model_is_saved_loaded_and_kept_from_the_published_layout(tmp_path):
    spec = CASES["prior"]
    save_model(tmp_path / "model", spec, some_state(spec), {})
    model, tokens = load_model(tmp_path / "model", dtype=torch.float64), some_tokens(spec)
    assert model.spec == spec == TransformerSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert (model(tokens) - reference(spec, some_state(spec), tokens)).abs().max() <= 1e-10
    with pytest.raises(UserError, match="normalization rms, positions rotary2d, activation swiglu, qk_norm True") as e:
        to_official(tmp_path / "model", tmp_path / "out.pt")
    assert "\n" not in str(e.value) and str(tmp_path / "model") in str(e.value) and not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": "rotary2d", "width": 20}, "width / heads is 10 .20 / 2., expected a multiple of 4"),
        ({"positions": "rotary"}, "positions is 'rotary', expected 'learned' or 'rotary2d'"),
        ({"normalization": True}, "normalization is True, expected 'layer' or 'rms'"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"qk_norm": "yes"}, "qk_norm is 'yes', expected true or false"),
        (
            {"kind": "nar", "target_positions": True},
            "target_positions is true, expected false for a pixel decoder .nar.",
        ),
    ],
)
def test_choices_that_cannot_work_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        replace(PLAIN, **change)


def test_an_option_of_the_models_is_declared_once():
    """Recipe, specification and ``config.json`` have the same options, defaults and ranges, from one class."""
    options = {option.name for option in fields(Architecture)}
    assert options < set(ModelConfig.model_fields) and options < set(PLAIN.to_dict())
    assert not options & (vars(ModelConfig)["__annotations__"].keys() | vars(TransformerSpec)["__annotations__"].keys())
    assert all(ModelConfig.model_fields[name].description for name in options)
    recipe, spec = ModelConfig.read({}), TransformerSpec(discriminative_codes=8)
    assert spec.architecture == recipe.architecture | {"ffn_width": 4096}
    with pytest.raises(UserError, match="layers is 10001"):
        ModelConfig.read({"layers": 10_001})
    with pytest.raises(UserError, match="layers is 10001"):
        replace(PLAIN, layers=10_001)
