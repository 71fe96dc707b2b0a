"""What an artefact was made from, and the refusal of artefacts that do not belong together, whatever their shapes say.

Each stage writes the identity of what it read, each consumer compares. In ``provenance`` of a codebook, a manifest of
token shards, a checkpoint or a released model:

```
encoder_sha256, architecture, layer, transform   the encoder's file and its options (heads are in the architecture)
codebook_sha256, vqgan_sha256                    the two vocabularies
classes                                          class names; a label is a position in this list
shards_sha256                                    hash of the shards' index, which holds the hash of every shard
class_dropout                                    share of images that a model was trained on without their class
```

A key that an artefact lacks, such as a published checkpoint, is not compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from digit_ds.errors import UserError

ENCODER = {
    "encoder_sha256": "encoder",
    "architecture": "encoder architecture",
    "layer": "encoder layer",
    "transform": "image transform",
}
"""Keys that define features, with their names in messages."""
DISCRIMINATIVE = ENCODER | {"codebook_sha256": "codebook"}
"""Keys that define what a discriminative token means."""
VQ = {"vqgan_sha256": "VQGAN"}
"""Keys that define what a VQ token means."""
TOKENS = DISCRIMINATIVE | VQ


class Part(NamedTuple):
    """An artefact's name for messages and its provenance."""

    name: str
    provenance: Mapping[str, Any]


def check_agreement(parts: Sequence[Part], keys: Mapping[str, str] = TOKENS) -> None:
    """Refuse parts of different origin.

    Raises:
        UserError: names the first two parts that differ, and in what.
    """
    for key, what in keys.items():
        known = [part for part in parts if part.provenance.get(key) is not None]
        for first, second in pairwise(known):
            ours, theirs = first.provenance[key], second.provenance[key]
            if ours != theirs:
                raise UserError(
                    f"{first.name}: belongs to {what} {_short(ours)} ({key}), but {second.name} to {what} "
                    f"{_short(theirs)}; they must be the same"
                )


def check_classes(parts: Iterable[Part]) -> None:
    """Refuse parts whose labels mean different classes: other names, another number or another order.

    Raises:
        UserError: names the first two parts that differ, and the first class that does.
    """
    known = [part for part in parts if part.provenance.get("classes")]
    for first, second in pairwise(known):
        ours, theirs = list(first.provenance["classes"]), list(second.provenance["classes"])
        if ours == theirs:
            continue
        if len(ours) != len(theirs):
            raise UserError(
                f"{first.name}: has {len(ours)} classes, but {second.name} has {len(theirs)}; they must be the same"
            )
        label = next(label for label, (own, other) in enumerate(zip(ours, theirs)) if own != other)
        raise UserError(
            f"{first.name}: label {label} is class {ours[label]!r}, but {theirs[label]!r} in {second.name}; "
            "classes and their order must be the same"
        )


def _short(value: Any) -> str:
    """Hashes are shortened to their first digits; other values are shown in full."""
    text = str(value)
    return text[:12] if len(text) == 64 and " " not in text else text
