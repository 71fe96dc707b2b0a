"""What defines a model: its architecture, which a recipe chooses, and the vocabulary and grid that the shards add.

:class:`Architecture` is the only declaration of an option of the models. A recipe's ``model`` section and
:class:`TransformerSpec`, which ``config.json`` holds, both inherit it.
"""

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le

from digit_ds.errors import UserError
from digit_ds.files import is_whole
from digit_ds.vocabulary import Kind, Vocabulary

NormPosition = Literal["post", "pre"]
Normalization = Literal["layer", "rms"]
Positions = Literal["learned", "rotary2d"]
Activation = Literal["gelu", "swiglu"]
_Size = Annotated[int, Ge(1)]
_Count = Annotated[int, Ge(0)]
_ANY = 2**31 - 1


@dataclass(frozen=True)
class Architecture:
    """Sizes and choices of a transformer that do not depend on its tokens."""

    kind: Kind = "prior"
    """``prior`` (stage 1), ``ar`` or ``nar`` (stage-2 pixel decoders), ``vq`` (baseline on VQ tokens)."""
    layers: Annotated[int, Ge(1), Le(10_000)] = 16
    """Transformer layers; base 16, large 24."""
    width: _Size = 1024
    """Model width D; base 1024, large 1536."""
    heads: _Size = 16
    """Attention heads; must divide the width."""
    ffn_width: Annotated[int | None, Ge(1)] = None
    """Feed-forward width; unset: 4 x width, or with ``swiglu`` 8/3 x width (as many weights) to a multiple of 128."""
    norm_position: NormPosition = "post"
    """Where the norms sit: published stage 1 is ``post``, stage 2 and the VQ baseline are ``pre``."""
    max_positions: _Size = 1024
    """Rows of each learned position table (without the two that fairseq reserves); unused with rotary positions."""
    normalization: Normalization = field(default="layer", kw_only=True)
    """``layer`` (published) or ``rms``: RMSNorm (arXiv 1910.07467), which subtracts no mean and adds no bias."""
    positions: Positions = field(default="learned", kw_only=True)
    """``learned`` tables (published) or ``rotary2d``: queries and keys turn by the token's row and column."""
    activation: Activation = field(default="gelu", kw_only=True)
    """``gelu`` (published) or ``swiglu`` (arXiv 2002.05202): a third feed-forward matrix gates the first."""
    qk_norm: bool = field(default=False, kw_only=True)
    """RMSNorm of each head's query and key (arXiv 2302.05442; published: none)."""

    @property
    def feed_forward(self) -> int:
        """The feed-forward width, stated or not."""
        if self.ffn_width is not None:
            return self.ffn_width
        return 4 * self.width if self.activation == "gelu" else max(1, round(8 * self.width / 3 / 128)) * 128

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def architecture(self) -> dict[str, Any]:
        """The fields of this class alone, by name."""
        return {option.name: getattr(self, option.name) for option in fields(Architecture)}

    def check_widths(self, prefix: str = "") -> None:
        """Refuse sizes that each may be but not together.

        Args:
            prefix: what stands before the fields' names in the message.

        Raises:
            UserError: the heads do not divide the width, or have a width that rotary positions cannot turn.
        """
        if self.width % self.heads:
            raise UserError(f"{prefix}width is {self.width}, expected a multiple of {prefix}heads {self.heads}")
        if self.positions == "rotary2d" and self.head_width % 4:
            raise UserError(
                f"{prefix}width / {prefix}heads is {self.head_width} ({self.width} / {self.heads}), expected a "
                f"multiple of 4 with {prefix}positions rotary2d, which rotates pairs of features along two axes"
            )


@dataclass(frozen=True)
class TransformerSpec(Architecture):
    """One transformer: its architecture and its tokens; ``ffn_width`` is always stated.

    Two models with equal specs have state dicts of equal names and shapes.
    """

    discriminative_codes: _Count = 0
    """K of the codebook; 0 for ``vq``."""
    vq_codes: _Count = 0
    """Codes of the VQGAN; 0 for ``prior``."""
    classes: _Count = 0
    """Class tokens; 0: unconditional."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the token grid; an image is rows x columns tokens in row-major order."""
    target_positions: bool = field(default=False, kw_only=True)
    """Whether each position adds an embedding of the place that it predicts, so that the tokens may be written in any
    order (target-aware positional embedding of RAR, arXiv 2411.00776)."""

    def __post_init__(self) -> None:
        for name, annotation in _annotations().items():
            if name != "ffn_width" or self.ffn_width is not None:
                _check(name, annotation, getattr(self, name))
        object.__setattr__(self, "ffn_width", self.feed_forward)
        if not isinstance(self.grid, (list, tuple)) or len(self.grid) != 2:
            raise UserError(f"grid is {reprlib.repr(self.grid)}, expected [rows, columns]")
        for side in self.grid:
            _check("a side of grid", _Size, side)
        self.check_widths()
        if self.target_positions and self.kind not in ("prior", "vq"):
            raise UserError(f"target_positions is true, expected false for a pixel decoder ({self.kind})")
        object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def vocabulary(self) -> Vocabulary:
        """The token-id layout of this model."""
        return Vocabulary(self.kind, self.discriminative_codes, self.vq_codes, self.classes)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that has positions, prefix included."""
        if self.positions == "rotary2d":
            return self.sequence_length
        prefix, own = self.prefix_length, self.max_positions  # two tables, each of max_positions
        return prefix + own if prefix <= own else own

    @property
    def unpublished(self) -> list[str]:
        """Options that the published architecture does not have, as ``name value``."""
        return [
            f"{option.name} {getattr(self, option.name)}"
            for option in _modern()
            if getattr(self, option.name) != option.default
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
        """Whether attention is causal; the NAR decoder attends to all positions."""
        return self.kind != "nar"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> "TransformerSpec":
        """Inverse of :meth:`to_dict`; unknown or missing keys are errors that name ``source``.

        Later choices may be missing: files that were written before there was a choice lack them.
        """
        known = {option.name for option in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"{source}: unknown key {reprlib.repr(unknown[0])}, expected {', '.join(sorted(known))}")
        optional = {option.name for option in _modern()} | {"grid"}
        if missing := sorted(known - optional - set(values)):
            raise UserError(f"{source}: key {missing[0]!r} is missing")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def _modern() -> Iterator[Field[Any]]:
    """Options that published models do not have; their defaults are the published architecture."""
    return (option for option in fields(TransformerSpec) if option.kw_only)


@cache
def _annotations() -> Mapping[str, Any]:
    """The annotations of a specification's fields, ``grid`` apart."""
    found = get_type_hints(TransformerSpec, include_extras=True)
    return {option.name: found[option.name] for option in fields(TransformerSpec) if option.name != "grid"}


def _check(name: str, annotation: Any, found: object) -> None:
    """Refuse a value that is not of a field's type or outside its range."""
    if annotation is bool:
        if not isinstance(found, bool):
            raise UserError(f"{name} is {reprlib.repr(found)}, expected true or false")
    elif get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if found not in choices:
            raise UserError(f"{name} is {reprlib.repr(found)}, expected {' or '.join(map(repr, choices))}")
    else:
        bounds = annotation.__metadata__
        smallest: Any = next(bound.ge for bound in bounds if isinstance(bound, Ge))
        largest: Any = next((bound.le for bound in bounds if isinstance(bound, Le)), _ANY)
        if not is_whole(found, smallest, largest):
            raise UserError(f"{name} is {reprlib.repr(found)}, expected a whole number from {smallest} to {largest}")
