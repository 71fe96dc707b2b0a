"""How codes become the token sequences that each kind of model reads and predicts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.model.spec import TransformerSpec
from digit_ds.vocabulary import EOS, MASK, SPECIALS


class Sequence(NamedTuple):
    """One training batch. The target belongs to the last T' positions of the input."""

    input: Tensor
    """int64 [B, T]; ``spec.sequence_length`` tokens, prefix included."""
    target: Tensor
    """int64 [B, T'], T' = 1 + image tokens."""
    loss_mask: Tensor | None
    """bool [B, T'] of the positions that count (NAR: the masked ones); None: all."""
    order: Tensor | None = None
    """int64 [B, G]: the place, counted in raster order, of each image token in the order written; None: raster."""


def training_sequence(
    spec: TransformerSpec,
    discriminative: Tensor | None,
    vq: Tensor | None,
    labels: Tensor | None,
    generator: torch.Generator | None = None,
    class_dropout: float = 0.0,
    random_share: float = 0.0,
) -> Sequence:
    """Codes of a batch -> input, target and loss mask.

    ``prior`` and ``vq``: ``[BOS or class, tokens] -> [tokens, EOS]``. ``ar``: the same for VQ tokens after a prefix of
    discriminative ones. ``nar``: ``[prefix, BOS, tokens, some masked] -> [EOS, tokens]``, not shifted, where
    ``floor(tokens * cos(u * pi / 2) + 1)`` positions of each image are masked, u uniform in [0, 1).

    Args:
        discriminative: int64 [B, tokens] codes 0..K-1; read unless the kind is ``vq``.
        vq: int64 [B, tokens] codes 0..N-1; read unless the kind is ``prior``.
        labels: int64 [B]; read by class-conditional models only.
        generator: draws the NAR masks, the class dropout and the random orders.
        class_dropout: share of images whose class token is replaced by BOS.
        random_share: share of images whose tokens are written in a random order, the rest in raster order
            (RAR, arXiv 2411.00776, section 3.2); more than 0 only for a model with ``spec.target_positions``.
    """
    vocabulary = spec.vocabulary
    written = _codes(spec, discriminative, "discriminative") if spec.kind == "prior" else _codes(spec, vq, "VQ")
    tokens = vocabulary.token(written)
    batch = len(tokens)
    start = start_tokens(spec, labels if spec.classes else None, batch, device=tokens.device)
    if spec.classes and class_dropout > 0:
        dropped = _uniform((batch,), generator, tokens.device) < class_dropout
        start = torch.where(dropped, EOS, start)
    start = start.unsqueeze(1)
    prefix = []
    if vocabulary.has_prefix:
        prefix = [vocabulary.prefix_token(_codes(spec, discriminative, "discriminative"))]
    end = torch.full_like(start, EOS)
    if spec.kind != "nar":
        order = None
        if random_share > 0:
            order = _orders(batch, spec.tokens, random_share, generator, tokens.device)
            tokens = tokens.gather(1, order)
        return Sequence(torch.cat([*prefix, start, tokens], dim=1), torch.cat([tokens, end], dim=1), None, order)
    hidden = _nar_mask(batch, spec.tokens, generator, tokens.device)
    masked = torch.where(hidden, MASK, tokens)
    loss_mask = torch.cat([torch.zeros_like(start, dtype=torch.bool), hidden], dim=1)
    return Sequence(torch.cat([*prefix, start, masked], dim=1), torch.cat([end, tokens], dim=1), loss_mask)


def start_tokens(
    spec: TransformerSpec, labels: Tensor | None, batch: int, device: torch.device | str | None = None
) -> Tensor:
    """The token that opens each image: class tokens for ``labels`` int64 [B], BOS without labels -> int64 [B].

    A class-conditional model without labels gets BOS: the unconditional half of classifier-free guidance.
    """
    if labels is None:
        return torch.full((batch,), EOS, dtype=torch.int64, device=device)
    if not spec.classes:
        raise UserError(f"labels were given, expected none: this {spec.kind} model is unconditional")
    if labels.device.type == "cpu" and batch and not 0 <= int(labels.min()) <= int(labels.max()) < spec.classes:
        raise UserError(
            f"label is {_outside(labels, spec.classes)}, expected 0..{spec.classes - 1}, this model's classes"
        )
    return spec.vocabulary.class_token(labels.to(device or labels.device, torch.int64))


def prompt_tokens(spec: TransformerSpec, discriminative: Tensor | None, labels: Tensor | None, batch: int) -> Tensor:
    """What generation begins with: a pixel decoder's prefix (discriminative codes [B, tokens]), then the start token.

    Returns:
        int64 [B, prefix_length + 1].
    """
    if not spec.vocabulary.has_prefix:
        return start_tokens(spec, labels, batch).unsqueeze(1)
    codes = _codes(spec, discriminative, "discriminative")
    start = start_tokens(spec, labels, batch, device=codes.device).unsqueeze(1)
    return torch.cat([spec.vocabulary.prefix_token(codes), start], dim=1)


def check_sequence(spec: TransformerSpec, tokens: Tensor) -> None:
    """Refuse ids that no sequence of a model has in their place, such as bare codes.

    Looks at the start token and at a pixel decoder's prefix; the ids after them could be codes or tokens. Nothing is
    checked outside the CPU, where looking would wait for the device, or while a graph is compiled.

    Args:
        tokens: int64 [B, T] ids, from the first position on.
    """
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or not tokens.numel():
        return
    vocabulary, prefix = spec.vocabulary, spec.prefix_length
    made = "sequences of ids are made by digit_ds.model.sequences.training_sequence"
    given, first = tokens[:, :prefix], vocabulary.output_size + SPECIALS
    if (given < first).any():
        raise UserError(
            f"a {spec.kind} model was given the id {int(given.min())} in its prefix of {prefix} discriminative tokens, "
            f"expected {first} or more (code j has the id j + {first}); {made}"
        )
    start = tokens[:, prefix : prefix + 1]
    wrong = (start != EOS) & ((start < vocabulary.output_size) if spec.classes else True)
    if wrong.any():
        classes = f" or a class token {vocabulary.output_size} or more" if spec.classes else ""
        raise UserError(
            f"a {spec.kind} model was given the id {int(start[wrong][0])} at position {prefix}, expected the start "
            f"token {EOS}{classes}; the ids of an image follow it, code j as j + {SPECIALS}; {made}"
        )


def _codes(spec: TransformerSpec, codes: Tensor | None, name: str) -> Tensor:
    """``codes`` as int64, refused when absent, of another grid or (checked where it is free) out of range."""
    if codes is None:
        raise UserError(f"the data has no {name} tokens, expected them for a {spec.kind} model")
    if codes.shape[1] != spec.tokens:
        rows, columns = spec.grid
        raise UserError(f"images have {codes.shape[1]} {name} tokens, expected {spec.tokens} ({rows}x{columns} grid)")
    size = spec.discriminative_codes if name == "discriminative" else spec.vq_codes
    if codes.device.type == "cpu" and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise UserError(f"{name} code is {_outside(codes, size)}, expected 0..{size - 1}, this model's vocabulary")
    return codes.to(torch.int64)


def _outside(values: Tensor, size: int) -> int:
    """Some value that is not in 0..size-1."""
    low, high = int(values.min()), int(values.max())
    return low if low < 0 else high


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator lives."""
    where = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=where).to(device)


def _nar_mask(batch: int, tokens: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """bool [B, tokens]: the positions hidden from a NAR decoder, a random number of them for each image."""
    share = torch.cos(_uniform((batch, 1), generator, device) * (math.pi / 2))
    count = torch.floor(tokens * share + 1).clamp(max=tokens)
    order = _uniform((batch, tokens), generator, device).argsort(dim=1).argsort(dim=1)  # rank of each position
    return order < count


def _orders(
    batch: int, tokens: int, random_share: float, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """int64 [B, G]: a permutation of the places for each image; all but ``random_share`` of the images keep raster."""
    random = _uniform((batch, tokens), generator, device).argsort(dim=1)
    chosen = _uniform((batch, 1), generator, device) < random_share
    return torch.where(chosen, random, torch.arange(tokens, device=device))
