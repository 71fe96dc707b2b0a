"""What defines a released model: the sizes and choices written to ``config.json``."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from digit_ds.errors import UserError
from digit_ds.vocabulary import Kind, Vocabulary


@dataclass(frozen=True)
class TransformerSpec:
    """Sizes of one transformer. Two models with equal specs have state dicts of equal names and shapes."""

    kind: Kind
    layers: int
    width: int
    heads: int
    ffn_width: int
    norm_position: Literal["post", "pre"]
    max_positions: int
    discriminative_codes: int
    vq_codes: int
    classes: int
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the token grid; an image is rows x columns tokens in row-major order."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.norm_position not in ("post", "pre"):
            raise UserError(f"norm_position is {self.norm_position!r}, expected 'post' or 'pre'")
        object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def vocabulary(self) -> Vocabulary:
        """The token-id layout of this model."""
        return Vocabulary(self.kind, self.discriminative_codes, self.vq_codes, self.classes)

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
        """Inverse of :meth:`to_dict`; unknown or missing keys are errors that name ``source``."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"{source}: unknown key {unknown[0]!r}, expected {', '.join(sorted(known))}")
        if missing := sorted(known - set(values) - {"grid"}):
            raise UserError(f"{source}: key {missing[0]!r} is missing")
        return cls(**values)
