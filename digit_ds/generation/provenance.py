"""Parts that were made with different encoders, codebooks or VQGANs do not fit, whatever their shapes say."""

from typing import Any, NamedTuple

from digit_ds.errors import UserError

_MADE_WITH = {
    "encoder_sha256": "encoder",
    "architecture": "encoder architecture",
    "layer": "encoder layer",
    "codebook_sha256": "codebook",
    "vqgan_sha256": "VQGAN",
}


class Part(NamedTuple):
    """A file or model and what it says of its origin."""

    name: str
    provenance: dict[str, Any]


def check_agreement(parts: list[Part]) -> None:
    """Refuse parts of different origin. What a part does not know of itself (a published checkpoint) is not held
    against it.

    Raises:
        UserError: names the first two parts that differ, and in what.
    """
    for key, what in _MADE_WITH.items():
        known = [(part.name, part.provenance[key]) for part in parts if part.provenance.get(key) is not None]
        for name, value in known[1:]:
            first_name, first_value = known[0]
            if value != first_value:
                raise UserError(
                    f"{first_name}: belongs to {what} {str(first_value)[:12]}, but {name} to {str(value)[:12]}; "
                    "they must be the same"
                )
