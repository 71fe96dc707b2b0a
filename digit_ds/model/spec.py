"""What defines a released model: the sizes and choices written to ``config.json``."""

import reprlib
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from digit_ds.errors import UserError
from digit_ds.files import is_whole
from digit_ds.vocabulary import Kind, Vocabulary

NormPosition = Literal["post", "pre"]
Normalization = Literal["layer", "rms"]
Positions = Literal["learned", "rotary2d"]
Activation = Literal["gelu", "swiglu"]
_CHOICES: dict[str, Any] = {
    "norm_position": NormPosition,
    "normalization": Normalization,
    "positions": Positions,
    "activation": Activation,
}
_MODERN = ("normalization", "positions", "activation", "qk_norm", "target_positions")
"""Choices whose defaults are all that published models have."""
_SMALLEST = {
    **dict.fromkeys(("layers", "width", "heads", "ffn_width", "max_positions"), 1),
    **dict.fromkeys(("discriminative_codes", "vq_codes", "classes"), 0),
}
_LARGEST = {"layers": 10_000}
"""A damaged file must not make millions of names of layers; other sizes are compared with the tensors alone."""
_ANY = 2**31 - 1


@dataclass(frozen=True)
class TransformerSpec:
    """Sizes and choices of one transformer; the choices' defaults are the published architecture.

    Two models with equal specs have state dicts of equal names and shapes.
    """

    kind: Kind
    layers: int
    width: int
    heads: int
    ffn_width: int
    norm_position: NormPosition
    max_positions: int
    """Rows of each learned position table; without meaning for rotary positions."""
    discriminative_codes: int
    vq_codes: int
    classes: int
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the token grid; an image is rows x columns tokens in row-major order."""
    normalization: Normalization = "layer"
    """LayerNorm, or RMSNorm (arXiv 1910.07467): no mean is subtracted, no bias added."""
    positions: Positions = "learned"
    """Learned tables, or rotation of queries and keys by row and column (:mod:`digit_ds.model.rotary`)."""
    activation: Activation = "gelu"
    """``down(gelu(up(x)))``, or SwiGLU (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``."""
    qk_norm: bool = False
    """Whether each head's query and key go through RMSNorm before they are compared (arXiv 2302.05442)."""
    target_positions: bool = False
    """Whether each position adds an embedding of the place that it predicts, so that the tokens may be written in any
    order (target-aware positional embedding of RAR, arXiv 2411.00776)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"kind is {reprlib.repr(self.kind)}, expected {', '.join(map(repr, get_args(Kind)))}")
        for name, smallest in _SMALLEST.items():
            _check_size(name, getattr(self, name), smallest, _LARGEST.get(name, _ANY))
        if not isinstance(self.grid, (list, tuple)) or len(self.grid) != 2:
            raise UserError(f"grid is {reprlib.repr(self.grid)}, expected [rows, columns]")
        for side in self.grid:
            _check_size("a side of grid", side, 1, _ANY)
        if self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by heads {self.heads}")
        for name, choices in _CHOICES.items():
            if (found := getattr(self, name)) not in get_args(choices):
                raise UserError(
                    f"{name} is {reprlib.repr(found)}, expected {' or '.join(map(repr, get_args(choices)))}"
                )
        for name in ("qk_norm", "target_positions"):
            if not isinstance(found := getattr(self, name), bool):
                raise UserError(f"{name} is {reprlib.repr(found)}, expected true or false")
        if self.target_positions and self.kind not in ("prior", "vq"):
            raise UserError(f"target_positions is true, but a pixel decoder ({self.kind}) writes in raster order alone")
        if self.positions == "rotary2d" and self.head_width % 4:
            raise UserError(
                f"positions is 'rotary2d', which turns pairs of numbers along two axes, but a head's width "
                f"{self.head_width} (width {self.width} / heads {self.heads}) is not divisible by 4"
            )
        object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def vocabulary(self) -> Vocabulary:
        """The token-id layout of this model."""
        return Vocabulary(self.kind, self.discriminative_codes, self.vq_codes, self.classes)

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that has positions, prefix included."""
        if self.positions == "rotary2d":
            return self.sequence_length
        prefix, own = self.prefix_length, self.max_positions  # two tables, each of max_positions
        return prefix + own if prefix <= own else own

    @property
    def unpublished(self) -> list[str]:
        """Choices that the published architecture does not know, as ``name value``."""
        return [
            f"{field.name} {getattr(self, field.name)}"
            for field in fields(self)
            if field.name in _MODERN and getattr(self, field.name) != field.default
        ]

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix_length(self) -> int:
        """Discriminative tokens that precede BOS (pixel decoders), else 0."""
        return self.tokens if self.vocabulary.has_prefix else 0

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence: prefix, BOS or class token, image tokens."""
        return self.prefix_length + 1 + self.tokens

    @property
    def causal(self) -> bool:
        """Whether attention is causal; the NAR decoder sees everything."""
        return self.kind != "nar"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> "TransformerSpec":
        """Inverse of :meth:`to_dict`; unknown or missing keys are errors that name ``source``.

        Keys that have a default may be missing: files that were written before there was a choice lack them.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"{source}: unknown key {reprlib.repr(unknown[0])}, expected {', '.join(sorted(known))}")
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := sorted(required - set(values)):
            raise UserError(f"{source}: key {missing[0]!r} is missing")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def _check_size(name: str, found: object, smallest: int, largest: int) -> None:
    if not is_whole(found, smallest, largest):
        raise UserError(f"{name} is {reprlib.repr(found)}, expected a whole number from {smallest} to {largest}")
