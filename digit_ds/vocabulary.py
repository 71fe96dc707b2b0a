"""The token-id layout of the published models (fairseq's dictionary): the only place that knows an offset.

Ids 0..4 are special, the codes follow from 5 (``golden``: ``nspecial``). Class tokens of a class-conditional prior come
after the codes and exist in the embedding only. A pixel decoder reads a joint table: the whole VQ dictionary (specials
included), then the whole discriminative dictionary; it predicts VQ tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

SENTENCE = 0
"""``<s>``: in the dictionary, never in a sequence."""
PAD = 1
EOS = 2
"""End of the image and, as in fairseq's language models, also BOS: what every unconditional sequence begins with."""
MASK = 3
"""fairseq's ``<unk>``: the mask token of the parallel (NAR) pixel decoder."""
NEWLINE = 4
SPECIALS = 5
"""Number of special ids; code ``j`` has id ``j + SPECIALS``."""

Kind = Literal["prior", "ar", "nar", "vq"]
"""``prior`` over discriminative tokens, ``ar`` and ``nar`` pixel decoders, ``vq`` baseline straight on VQ tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids of one kind of model.

    ``discriminative_codes`` is K of the codebook (0 for ``vq``), ``vq_codes`` that of the VQGAN (0 for ``prior``),
    ``classes`` the number of class tokens (0: unconditional).
    """

    kind: Kind
    discriminative_codes: int
    vq_codes: int = 0
    classes: int = 0

    @property
    def has_prefix(self) -> bool:
        """Whether a sequence begins with discriminative tokens as a condition (the pixel decoders)."""
        return self.kind in ("ar", "nar")

    @property
    def output_size(self) -> int:
        """V: number of logits, that is the dictionary of the tokens this model writes, specials included."""
        return SPECIALS + (self.discriminative_codes if self.kind == "prior" else self.vq_codes)

    @property
    def embedding_rows(self) -> int:
        """Rows of the input table: what is written, then class tokens or the discriminative dictionary."""
        prefix_rows = SPECIALS + self.discriminative_codes if self.has_prefix else 0
        return self.output_size + prefix_rows + self.classes

    def token(self, codes: Tensor) -> Tensor:
        """Codes 0.. of the kind this model writes (discriminative for ``prior``, else VQ) -> token ids."""
        return codes + SPECIALS

    def code(self, tokens: Tensor) -> Tensor:
        """Inverse of :meth:`token`."""
        return tokens - SPECIALS

    def prefix_token(self, codes: Tensor) -> Tensor:
        """Discriminative codes -> ids of a pixel decoder's prefix in the joint table."""
        return codes + SPECIALS + self.output_size

    def class_token(self, labels: Tensor) -> Tensor:
        """Labels 0.. -> ids of the class tokens that take the place of BOS."""
        return labels + self.output_size
