"""The one description of a transformer's parameters, and every mapping that follows from it.

``SCHEMA`` has one rule a parameter: its name, shape, how tensor parallelism cuts it, how it starts, and what the
published (fairseq) checkpoints call it. Initial weights, parameter counts, the mapping to and from published names
and Megatron shards are all derived from it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from digit_ds.errors import UserError
from digit_ds.model.spec import TransformerSpec
from digit_ds.vocabulary import PAD

if TYPE_CHECKING:  # parameter counts and shapes need no torch, which takes seconds to import
    from torch import Tensor

State = dict[str, "Tensor"]
Split = Literal["replicated", "column", "row", "vocabulary"]
"""How ranks share a parameter: whole on each; cut along dim 0; cut along dim 1; padded, then cut along dim 0."""
Start = Literal["table", "position", "normal", "attention", "xavier", "linear", "zero", "one"]

POSITION_OFFSET = 2
"""Position 0 uses row 2 of a position table (fairseq counts from the pad id + 1)."""
VOCABULARY_MULTIPLE = 128
"""Megatron's vocabulary tables are padded to a multiple of this, whatever the tensor-parallel size."""
_SPLIT_DIM: dict[str, int | None] = {"replicated": None, "column": 0, "row": 1, "vocabulary": 0}


@dataclass(frozen=True)
class Rule:
    """One line of the schema.

    ``name`` and ``official`` hold ``{i}`` for the layer number. ``shape`` names sizes (see :func:`_sizes`). Three
    official names mean that q, k and v are fused: rows grouped by head, for each head its q, k and v rows (Megatron's
    order), so that a tensor-parallel slice is a plain slice. None at all: no published
    model has the parameter.
    """

    name: str
    shape: tuple[str, ...]
    split: Split
    start: Start
    official: tuple[str, ...]
    applies: Callable[[TransformerSpec], bool] = lambda spec: True
    inputs: str = "D"
    """Inputs of the linear layer that the parameter belongs to; bounds its initial values."""


def _pre_norm(spec: TransformerSpec) -> bool:
    return spec.norm_position == "pre"


def _learned(spec: TransformerSpec) -> bool:
    return spec.positions == "learned"


def _layer_norm(spec: TransformerSpec) -> bool:
    return spec.normalization == "layer"


def _gelu(spec: TransformerSpec) -> bool:
    return spec.activation == "gelu"


_QKV = tuple(f"layers.{{i}}.self_attn.{letter}_proj" for letter in "qkv")

# D width, W width of a head, F feed-forward width, V logits, R rows of the input table, P rows of a position table,
# G tokens of an image.
# The rows of gate_up lie in pairs, gate and up of one feed-forward number after the other: as with the heads of qkv, a
# slice of the fused matrix holds both halves of what a rank computes, at any tensor-parallel size.
SCHEMA: tuple[Rule, ...] = (
    Rule("embedding.weight", ("R", "D"), "vocabulary", "table", ("embed_tokens.weight",)),
    Rule("positions.weight", ("P", "D"), "replicated", "position", ("embed_positions.weight",), _learned),
    Rule(
        "prefix_positions.weight", ("P", "D"), "replicated", "position", ("embed_positions_1.weight",),
        lambda spec: spec.vocabulary.has_prefix and _learned(spec),
    ),
    Rule("target_positions.weight", ("G", "D"), "replicated", "normal", (), lambda spec: spec.target_positions),
    Rule("layers.{i}.attention_norm.weight", ("D",), "replicated", "one", ("layers.{i}.self_attn_layer_norm.weight",)),
    Rule(
        "layers.{i}.attention_norm.bias", ("D",), "replicated", "zero", ("layers.{i}.self_attn_layer_norm.bias",),
        _layer_norm,
    ),
    Rule("layers.{i}.attention.qkv.weight", ("3D", "D"), "column", "attention", tuple(f"{n}.weight" for n in _QKV)),
    Rule("layers.{i}.attention.qkv.bias", ("3D",), "column", "linear", tuple(f"{n}.bias" for n in _QKV)),
    Rule("layers.{i}.attention.qk_norm.weight", ("2", "W"), "replicated", "one", (), lambda spec: spec.qk_norm),
    Rule("layers.{i}.attention.out.weight", ("D", "D"), "row", "xavier", ("layers.{i}.self_attn.out_proj.weight",)),
    Rule("layers.{i}.attention.out.bias", ("D",), "replicated", "zero", ("layers.{i}.self_attn.out_proj.bias",)),
    Rule("layers.{i}.ffn_norm.weight", ("D",), "replicated", "one", ("layers.{i}.final_layer_norm.weight",)),
    Rule("layers.{i}.ffn_norm.bias", ("D",), "replicated", "zero", ("layers.{i}.final_layer_norm.bias",), _layer_norm),
    Rule("layers.{i}.ffn.up.weight", ("F", "D"), "column", "linear", ("layers.{i}.fc1.weight",), _gelu),
    Rule("layers.{i}.ffn.up.bias", ("F",), "column", "linear", ("layers.{i}.fc1.bias",), _gelu),
    Rule("layers.{i}.ffn.gate_up.weight", ("2F", "D"), "column", "linear", (), lambda spec: not _gelu(spec)),
    Rule("layers.{i}.ffn.gate_up.bias", ("2F",), "column", "linear", (), lambda spec: not _gelu(spec)),
    Rule("layers.{i}.ffn.down.weight", ("D", "F"), "row", "linear", ("layers.{i}.fc2.weight",), inputs="F"),
    Rule("layers.{i}.ffn.down.bias", ("D",), "replicated", "linear", ("layers.{i}.fc2.bias",), inputs="F"),
    Rule("norm.weight", ("D",), "replicated", "one", ("layer_norm.weight",), _pre_norm),
    Rule(
        "norm.bias", ("D",), "replicated", "zero", ("layer_norm.bias",),
        lambda spec: _pre_norm(spec) and _layer_norm(spec),
    ),
    Rule("output.weight", ("V", "D"), "vocabulary", "normal", ("output_projection.weight",)),
)  # fmt: skip


def _sizes(spec: TransformerSpec) -> dict[str, int]:
    """What the letters in the schema's shapes stand for."""
    vocabulary = spec.vocabulary
    return {
        "D": spec.width,
        "3D": 3 * spec.width,
        "2": 2,
        "W": spec.head_width,
        "F": spec.feed_forward,
        "2F": 2 * spec.feed_forward,
        "V": vocabulary.output_size,
        "R": vocabulary.embedding_rows,
        "P": spec.max_positions + POSITION_OFFSET,
        "G": spec.tokens,
    }


@dataclass(frozen=True)
class Parameter:
    """One parameter of one model: a rule with the layer number and the sizes filled in."""

    name: str
    shape: tuple[int, ...]
    official: tuple[str, ...]
    rule: Rule

    @property
    def split_dim(self) -> int | None:
        """The dimension that tensor parallelism cuts; None: every rank holds the whole parameter."""
        return _SPLIT_DIM[self.rule.split]


def parameters(spec: TransformerSpec) -> Iterator[Parameter]:
    """Every parameter of a model, in the schema's order, layer by layer."""
    sizes = _sizes(spec)

    def filled(rule: Rule, layer: int | None) -> Parameter:
        names = (rule.name, *rule.official)
        name, *official = names if layer is None else (text.replace("{i}", str(layer)) for text in names)
        return Parameter(name, tuple(sizes[letter] for letter in rule.shape), tuple(official), rule)

    layer_rules = [rule for rule in SCHEMA if "{i}" in rule.name]
    first, last = SCHEMA.index(layer_rules[0]), SCHEMA.index(layer_rules[-1])
    yield from (filled(rule, None) for rule in SCHEMA[:first] if rule.applies(spec))
    for layer in range(spec.layers):
        yield from (filled(rule, layer) for rule in layer_rules if rule.applies(spec))
    yield from (filled(rule, None) for rule in SCHEMA[last + 1 :] if rule.applies(spec))


def parameter_count(spec: TransformerSpec) -> int:
    """Number of parameters of the released model (no vocabulary padding)."""
    return sum(math.prod(parameter.shape) for parameter in parameters(spec))


def check_state(state: Mapping[str, Tensor], spec: TransformerSpec, source: str) -> None:
    """Refuse a state dict whose names or shapes are not those of ``spec``; the message names ``source``."""
    expected = {parameter.name: parameter.shape for parameter in parameters(spec)}
    if missing := sorted(set(expected) - set(state)):
        raise UserError(f"{source}: tensor {missing[0]!r} is missing ({len(missing)} missing in all)")
    if extra := sorted(set(state) - set(expected)):
        raise UserError(f"{source}: tensor {extra[0]!r} does not belong to this model ({len(extra)} unexpected in all)")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            found = list(state[name].shape)
            raise UserError(f"{source}: tensor {name!r} has shape {found}, expected {list(shape)} by its config")


# --- initial weights ---------------------------------------------------------------------------------------------


def initial_state(spec: TransformerSpec, seed: int) -> State:
    """Fresh float32 weights, distributed as fairseq's.

    Each parameter is drawn from a generator seeded by (seed, name), so the values depend neither on the
    tensor-parallel size nor on the order of drawing.
    """
    return {parameter.name: _draw(parameter, spec, seed) for parameter in parameters(spec)}


@dataclass(frozen=True)
class InitialShard:
    """One tensor-parallel rank's part of :func:`initial_state`, drawn anew at each reading."""

    spec: TransformerSpec
    seed: int
    tensor_size: int
    rank: int

    def __post_init__(self) -> None:
        check_tensor_size(self.spec, self.tensor_size)

    def read(self, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """The parameters of these names, one whole at a time: float32 tensors of ``shard_shape``."""
        for parameter in parameters(self.spec):
            if parameter.name in names:
                value = _draw(parameter, self.spec, self.seed)
                yield parameter.name, shard_parameter(value, parameter, self.tensor_size, self.rank)


def _draw(parameter: Parameter, spec: TransformerSpec, seed: int) -> Tensor:
    import torch

    digest = hashlib.sha256(f"{seed}:{parameter.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    value = torch.zeros(parameter.shape)
    width = parameter.shape[-1]
    match parameter.rule.start:
        case "one":
            value.fill_(1.0)
        case "table" | "position":
            value.normal_(0.0, width**-0.5, generator=generator)
            value[PAD] = 0.0  # the pad row, which fairseq's position tables have too
        case "normal":
            value.normal_(0.0, width**-0.5, generator=generator)
        case "attention":  # q, k and v are [D, D] each: Xavier's bound with gain 1/sqrt(2)
            bound = math.sqrt(0.5) * math.sqrt(6.0 / (2 * width))
            value.uniform_(-bound, bound, generator=generator)
        case "xavier":
            bound = math.sqrt(6.0 / sum(parameter.shape))
            value.uniform_(-bound, bound, generator=generator)
        case "linear":  # torch.nn.Linear's own: weight and bias within 1/sqrt(inputs)
            bound = _sizes(spec)[parameter.rule.inputs] ** -0.5
            value.uniform_(-bound, bound, generator=generator)
    return value


# --- published names ---------------------------------------------------------------------------------------------


def fuse_qkv(parts: Sequence[Tensor], heads: int) -> Tensor:
    """Query, key and value, [D, ...] each -> [3D, ...] with rows grouped by head: for each head its q, k and v rows."""
    import torch

    grouped = [part.unflatten(0, (heads, -1)) for part in parts]  # [heads, D / heads, ...]
    return torch.stack(grouped, dim=1).flatten(0, 2)


def split_qkv(fused: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of :func:`fuse_qkv`."""
    query, key, value = fused.unflatten(0, (heads, 3, -1)).unbind(1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def from_official_names(official: Mapping[str, Tensor], spec: TransformerSpec, source: str) -> dict[str, list[Tensor]]:
    """Published decoder tensors (names without ``decoder.``) by our names, as they are.

    Three tensors of one name are query, key and value, to be joined by :func:`fuse_qkv`.
    """
    found: dict[str, list[Tensor]] = {}
    for parameter in parameters(spec):
        if missing := [name for name in parameter.official if name not in official]:
            raise UserError(
                f"{source}: tensor 'decoder.{missing[0]}' is missing, expected a DiGIT {spec.kind} checkpoint"
            )
        parts = [official[name] for name in parameter.official]
        shape = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        for name, part in zip(parameter.official, parts):
            if tuple(part.shape) != shape:
                raise UserError(
                    f"{source}: tensor 'decoder.{name}' has shape {list(part.shape)}, expected {list(shape)} "
                    "by the checkpoint's other tensors"
                )
        found[parameter.name] = parts
    known = {name for parameter in parameters(spec) for name in parameter.official}
    if extra := sorted(set(official) - known):
        raise UserError(f"{source}: tensor 'decoder.{extra[0]}' belongs to no published DiGIT {spec.kind} model")
    return found


def to_official_names(state: Mapping[str, Tensor], spec: TransformerSpec) -> State:
    """Inverse of :func:`from_official_names`."""
    official: State = {}
    for parameter in parameters(spec):
        value = state[parameter.name]
        parts = (value,) if len(parameter.official) == 1 else split_qkv(value, spec.heads)
        official.update(zip(parameter.official, parts))
    return official


# --- tensor-parallel shards --------------------------------------------------------------------------------------


def padded_rows(rows: int) -> int:
    """Rows of a vocabulary table in Megatron."""
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def check_tensor_size(spec: TransformerSpec, tensor_size: int) -> None:
    """Refuse a tensor-parallel size that does not divide the model."""
    parts = {"heads": spec.heads, "ffn_width": spec.feed_forward, "the vocabulary padding": VOCABULARY_MULTIPLE}
    for name, size in parts.items():
        if tensor_size < 1 or size % tensor_size:
            raise UserError(f"tensor-parallel size is {tensor_size}, expected a divisor of {name} ({size})")


def shard_shape(parameter: Parameter, tensor_size: int) -> tuple[int, ...]:
    """Shape of one rank's part of a parameter."""
    shape = list(parameter.shape)
    if parameter.rule.split == "vocabulary":
        shape[0] = padded_rows(shape[0])
    if parameter.split_dim is not None:
        shape[parameter.split_dim] //= tensor_size
    return tuple(shape)


def shard(state: Mapping[str, Tensor], spec: TransformerSpec, tensor_size: int, rank: int) -> State:
    """One tensor-parallel rank's part of a full state dict; padded vocabulary rows are zero. Tensors are contiguous."""
    check_tensor_size(spec, tensor_size)
    return {
        parameter.name: shard_parameter(state[parameter.name], parameter, tensor_size, rank)
        for parameter in parameters(spec)
    }


def shard_parameter(value: Tensor, parameter: Parameter, tensor_size: int, rank: int) -> Tensor:
    """One tensor-parallel rank's part of a whole parameter, contiguous."""
    import torch

    if parameter.rule.split == "vocabulary":
        padding = padded_rows(parameter.shape[0]) - parameter.shape[0]
        value = torch.cat([value, value.new_zeros(padding, value.shape[1])])
    dim = parameter.split_dim
    return (value if dim is None else value.chunk(tensor_size, dim)[rank]).contiguous()


def unshard(parts: Sequence[Mapping[str, Tensor]], spec: TransformerSpec) -> State:
    """Inverse of :func:`shard`: the parts of all ranks, in order -> the full state dict without padding."""
    check_tensor_size(spec, len(parts))
    return {
        parameter.name: unshard_parameter([part[parameter.name] for part in parts], parameter)
        for parameter in parameters(spec)
    }


def unshard_parameter(pieces: Sequence[Tensor], parameter: Parameter) -> Tensor:
    """Inverse of :func:`shard_parameter`: the parts of all ranks, in order -> the whole parameter without padding."""
    import torch

    if parameter.split_dim is None:
        if any(not torch.equal(pieces[0], piece) for piece in pieces[1:]):
            raise UserError(f"tensor {parameter.name!r} differs between tensor-parallel ranks, expected equal copies")
        return pieces[0]
    return torch.cat(list(pieces), parameter.split_dim)[: parameter.shape[0]]
