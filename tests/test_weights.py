"""The schema: every parameter by exactly one rule, and the mappings that follow from it."""

import re
from collections import Counter

import pytest
import torch
from golden_models import by_our_names
from small_models import MODERN_LAYERS

from digit_ds.errors import UserError
from digit_ds.model.partition import ShardReader, read_partitioned, write_partitioned
from digit_ds.model.released import save_model
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import Transformer
from digit_ds.model.weights import (
    SCHEMA,
    InitialShard,
    Rule,
    Split,
    check_state,
    initial_state,
    padded_rows,
    parameter_count,
    parameters,
    shard,
    shard_shape,
    to_official_names,
    unshard,
)

BASE = TransformerSpec("prior", 16, 1024, 16, 4096, "post", 1024, 8192, 0, 0)
LARGE = TransformerSpec("prior", 24, 1536, 16, 6144, "post", 1024, 16384, 0, 0)
SMALL = [
    TransformerSpec("prior", 3, 24, 4, 40, "post", 30, 130, 0, 0),
    TransformerSpec("prior", 2, 32, 8, 64, "pre", 30, 11, 0, 7),
    TransformerSpec("ar", 2, 16, 4, 24, "pre", 30, 251, 11, 0),
    TransformerSpec("nar", 1, 16, 4, 24, "post", 30, 12, 123, 0),
    TransformerSpec("vq", 2, 24, 4, 48, "pre", 30, 0, 19, 3),
]
MODERN = [
    TransformerSpec("prior", 2, 32, 8, 24, "pre", 30, 11, 0, 7, **MODERN_LAYERS),
    TransformerSpec("nar", 1, 16, 4, 20, "post", 30, 12, 123, 0, **MODERN_LAYERS),
]


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (BASE, 219_377_664),  # published
        (LARGE, 731_879_424),  # published as 732M
    ],
)
def test_full_sizes_have_the_published_parameter_counts(spec, count):
    with torch.device("meta"):
        model = Transformer(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(spec) == count


def name_pattern(rule: Rule, prefix: str = "") -> str:
    """Regular expression that matches a rule's parameter names, whole."""
    return "^" + re.escape(prefix) + re.escape(rule.name).replace(re.escape("{i}"), r"\d+") + "$"


def split_patterns(prefix: str = "") -> dict[Split, list[str]]:
    """Patterns of parameter names by how ranks share them, as DeepSpeed's universal checkpoint expects them.

    ``prefix`` stands before each name (that of a wrapping module). Vocabulary tables are listed on their own, but as
    their padding does not depend on the tensor-parallel size they may be joined along dim 0 like ``column`` ones.
    """
    patterns: dict[Split, list[str]] = {"replicated": [], "column": [], "row": [], "vocabulary": []}
    for rule in SCHEMA:
        patterns[rule.split].append(name_pattern(rule, prefix))
    return patterns


@pytest.mark.parametrize("spec", SMALL + MODERN)
def test_each_parameter_matches_exactly_one_rule(spec):
    with torch.device("meta"):
        state = Transformer(spec).state_dict()
    check_state(state, spec, "model")
    assert list(state) == list(initial_state(spec, 0))  # the module and the schema agree on the order too
    for name in state:
        assert sum(bool(re.match(name_pattern(rule), name)) for rule in SCHEMA) == 1, name
    official = Counter(name for parameter in parameters(spec) for name in parameter.official)
    assert set(official.values()) == {1}
    patterns = split_patterns("module.")
    for parameter in parameters(spec):
        kinds = [
            kind for kind, texts in patterns.items() for text in texts if re.match(text, f"module.{parameter.name}")
        ]
        assert kinds == [parameter.rule.split]


@pytest.mark.parametrize("spec", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_official_names_and_back_is_bit_exact(spec, dtype):
    state = {name: value.to(dtype) for name, value in initial_state(spec, 1).items()}
    official = to_official_names(state, spec)
    assert same(by_our_names(official, spec), state)


@pytest.mark.parametrize("spec", SMALL + MODERN)
@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_tensor_parallel_parts_and_back_is_bit_exact(spec, tensor_size):
    state = initial_state(spec, 1)
    parts = [shard(state, spec, tensor_size, rank) for rank in range(tensor_size)]
    for parameter in parameters(spec):
        assert all(tuple(part[parameter.name].shape) == shard_shape(parameter, tensor_size) for part in parts)
    assert same(unshard(parts, spec), state)
    padding = torch.cat([part["embedding.weight"] for part in parts])[spec.vocabulary.embedding_rows :]
    assert len(padding) == padded_rows(spec.vocabulary.embedding_rows) - spec.vocabulary.embedding_rows
    assert not padding.any()


def test_a_slice_of_fused_qkv_holds_whole_heads():
    """Rank r of 2 has the published q, k and v rows of its own heads, head by head."""
    spec = SMALL[0]
    state = initial_state(spec, 1)
    official = to_official_names(state, spec)
    size = spec.width // spec.heads
    part = shard(state, spec, 2, 1)["layers.1.attention.qkv.weight"]
    rows = []
    for head in (2, 3):
        for letter in "qkv":
            rows.append(official[f"layers.1.self_attn.{letter}_proj.weight"][head * size : (head + 1) * size])
    assert torch.equal(part, torch.cat(rows))


def test_column_then_row_parallel_layers_add_up():
    """Each rank's own rows, then its own columns, summed over ranks: the whole layer, as Megatron computes it."""
    spec = SMALL[0]
    state = initial_state(spec, 1)
    parts = [shard(state, spec, 2, rank) for rank in range(2)]
    x = torch.randn(5, spec.width, generator=torch.Generator().manual_seed(0))

    def ffn(weights):
        hidden = x @ weights["layers.0.ffn.up.weight"].T + weights["layers.0.ffn.up.bias"]
        return hidden.relu() @ weights["layers.0.ffn.down.weight"].T

    def attention_values(weights):  # v alone stands for what attention returns: whole heads, side by side
        rows = weights["layers.0.attention.qkv.weight"].unflatten(0, (-1, 3, spec.width // spec.heads))[:, 2]
        return (x @ rows.flatten(0, 1).T) @ weights["layers.0.attention.out.weight"].T

    for layer in (ffn, attention_values):
        assert torch.allclose(sum(layer(part) for part in parts), layer(state), atol=1e-5)


def test_unequal_replicas_are_refused():
    spec = SMALL[0]
    parts = [shard(initial_state(spec, 1), spec, 2, rank) for rank in range(2)]
    parts[1]["layers.0.ffn_norm.weight"] = parts[1]["layers.0.ffn_norm.weight"] + 1e-7
    with pytest.raises(UserError, match=r"'layers\.0\.ffn_norm\.weight' differs between tensor-parallel ranks"):
        unshard(parts, spec)


def test_initial_weights_are_fairseqs():
    spec = TransformerSpec("prior", 2, 128, 4, 384, "post", 100, 2000, 0, 10)
    state = initial_state(spec, 5)
    check_state(state, spec, "initial")
    assert not state["embedding.weight"][1].any() and not state["positions.weight"][1].any()
    for name in ("embedding.weight", "positions.weight", "output.weight"):
        assert state[name].std().item() == pytest.approx(128**-0.5, rel=0.05)
    bounds = {
        "attention.qkv.weight": (0.5 * 6 / 256) ** 0.5,
        "attention.qkv.bias": 128**-0.5,
        "attention.out.weight": (6 / 256) ** 0.5,
        "ffn.up.weight": 128**-0.5,
        "ffn.up.bias": 128**-0.5,
        "ffn.down.weight": 384**-0.5,
        "ffn.down.bias": 384**-0.5,
    }
    for name, bound in bounds.items():
        assert state[f"layers.1.{name}"].abs().max().item() == pytest.approx(bound, rel=0.05), name
    assert not state["layers.0.attention.out.bias"].any()
    assert torch.equal(state["layers.0.ffn_norm.weight"], torch.ones(128))
    assert same(state, initial_state(spec, 5)) and not same(state, initial_state(spec, 6))


def test_a_rank_draws_its_part_of_the_initial_weights():
    spec = SMALL[2]
    for size in (1, 2, 4):
        for rank in range(size):
            expected = shard(initial_state(spec, 1), spec, size, rank)
            first = InitialShard(spec, 1, size, rank)
            assert same(dict(first.read(expected)), expected)
            some = list(expected)[1::2]
            assert same(dict(first.read(some)), {name: expected[name] for name in some})
    with pytest.raises(UserError, match=r"tensor-parallel size is 3, expected a divisor of heads \(4\)"):
        InitialShard(spec, 1, 3, 0)


def test_initial_weights_of_a_parameter_depend_on_its_name_alone():
    deeper = TransformerSpec("prior", 3, 24, 4, 40, "pre", 30, 130, 0, 0)
    shallow = TransformerSpec("prior", 1, 24, 4, 40, "post", 30, 130, 0, 0)
    first, second = initial_state(deeper, 1), initial_state(shallow, 1)
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_partitioned_directory_round_trip(tmp_path, tensor_size):
    spec = SMALL[2]
    state = {name: value.half() for name, value in initial_state(spec, 1).items()}
    write_partitioned(tmp_path / "parts", spec, state, {"layer": 3}, tensor_size)
    found = read_partitioned(tmp_path / "parts")
    assert found.spec == spec and same(found.state, state) and found.provenance == {"layer": 3}
    save_model(tmp_path / "model", spec, state, {})
    for source in ("parts", "model"):  # any size can be read from any directory
        for wanted in (1, 2, 4):
            for rank in range(wanted):
                reader = ShardReader(tmp_path / source, wanted, rank)
                assert reader.spec == spec
                expected = shard(state, spec, wanted, rank)
                assert same(dict(reader.read(expected)), expected)
                some = list(expected)[1::2]
                assert same(dict(reader.read(some)), {name: expected[name] for name in some})


def test_partitioned_directory_errors(tmp_path):
    spec = SMALL[2]
    with pytest.raises(UserError, match=r"tensor-parallel size is 3, expected a divisor of heads \(4\)"):
        write_partitioned(tmp_path / "parts", spec, initial_state(spec, 1), {}, 3)
    assert not (tmp_path / "parts").exists()
    write_partitioned(tmp_path / "parts", spec, initial_state(spec, 1), {}, 2)
    part = tmp_path / "parts" / "tensor_rank_01_of_02.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"tensor_rank_01_of_02.*damaged or truncated"):
        read_partitioned(tmp_path / "parts")
    part.unlink()
    with pytest.raises(UserError, match=r"tensor_rank_01_of_02.*does not exist"):
        ShardReader(tmp_path / "parts", 2, 1)
    save_model(tmp_path / "model", spec, initial_state(spec, 1), {})
    with pytest.raises(UserError, match="tensor_parallel is None"):
        read_partitioned(tmp_path / "model")
