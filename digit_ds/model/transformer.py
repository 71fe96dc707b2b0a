"""The lean transformer for one process: sampling, probing, export.

It computes what ``megatron.py`` trains, from the same state dict, without a launcher or a process group.

Shapes: ``B`` images, ``T`` tokens, ``t`` new tokens, ``D`` width, ``H`` heads, ``V`` vocabulary.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from digit_ds.errors import UserError
from digit_ds.model.attention import NORM_EPSILON, Attention, KeyValueCache
from digit_ds.model.released import read_model
from digit_ds.model.rotary import rotation
from digit_ds.model.sequences import check_sequence
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.weights import POSITION_OFFSET


def make_norm(spec: TransformerSpec) -> nn.Module:
    """LayerNorm or RMSNorm over the width."""
    kind = nn.LayerNorm if spec.normalization == "layer" else nn.RMSNorm
    return kind(spec.width, NORM_EPSILON)


class FeedForward(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        self.up = nn.Linear(spec.width, spec.feed_forward)
        self.down = nn.Linear(spec.feed_forward, spec.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down(functional.gelu(self.up(hidden)))


class GatedFeedForward(nn.Module):
    """SwiGLU; the rows of ``gate_up`` lie in pairs (gate and up of number 0, then of number 1, ...)."""

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        self.gate_up = nn.Linear(spec.width, 2 * spec.feed_forward)
        self.down = nn.Linear(spec.feed_forward, spec.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.gate_up(hidden).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(functional.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual connection and a norm before or after it."""

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        self.pre_norm = spec.norm_position == "pre"
        self.attention_norm = make_norm(spec)
        self.attention = Attention(spec)
        self.ffn_norm = make_norm(spec)
        self.ffn = FeedForward(spec) if spec.activation == "gelu" else GatedFeedForward(spec)

    def forward(self, hidden: Tensor, turn: Tensor | None, *cached: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; ``turn`` as in :func:`digit_ds.model.attention.ready`.

        ``cached`` are :meth:`Attention.step`'s other arguments, none for a full pass.
        """
        attention = self.attention.step if cached else self.attention
        if self.pre_norm:
            hidden = hidden + attention(self.attention_norm(hidden), turn, *cached)
            return hidden + self.ffn(self.ffn_norm(hidden))
        hidden = self.attention_norm(hidden + attention(hidden, turn, *cached))
        return self.ffn_norm(hidden + self.ffn(hidden))


class Transformer(nn.Module):
    """One of the four transformers; ids as in ``vocabulary``, parameters as in ``weights.SCHEMA``.

    Causal, but for the NAR decoder, which attends in both directions. A pixel decoder's sequence begins with
    ``spec.prefix_length`` discriminative tokens, which have a position table of their own where positions are learned.
    """

    def __init__(self, spec: TransformerSpec):
        super().__init__()
        self.spec = spec
        vocabulary = spec.vocabulary
        self.embedding = nn.Embedding(vocabulary.embedding_rows, spec.width)
        if spec.positions == "learned":
            self.positions = nn.Embedding(spec.max_positions + POSITION_OFFSET, spec.width)
            if vocabulary.has_prefix:
                self.prefix_positions = nn.Embedding(spec.max_positions + POSITION_OFFSET, spec.width)
        if spec.target_positions:
            self.target_positions = nn.Embedding(spec.tokens, spec.width)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = make_norm(spec) if spec.norm_position == "pre" else nn.Identity()
        self.output = nn.Linear(spec.width, vocabulary.output_size, bias=False)

    def forward(self, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits of every position.

        Args:
            tokens: int64 [B, T] ids, from the first position on (prefix included).
            order: int64 [B, G] as in :class:`digit_ds.model.sequences.Sequence`, with all 1 + G tokens; None: raster.

        Returns:
            [B, T, V] in the model's dtype.

        Raises:
            UserError: T exceeds the positions there are, or (checked on the CPU only) an id is outside the input table
            or a sequence does not begin as those of :func:`digit_ds.model.sequences.training_sequence` do.
        """
        return self._logits(self.hidden_states(tokens, order)[-1])

    def hidden_states(self, tokens: Tensor, order: Tensor | None = None) -> list[Tensor]:
        """int64 [B, T] -> layers + 1 tensors [B, T, D]: what enters each layer, then what leaves the last (no norm)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if order is not None:
            positions = functional.pad(order + 1, (1, 0))  # [B, T]: the start token stands before the image
        self._check_ids(tokens)
        self._check_length(tokens.shape[1])
        check_sequence(self.spec, tokens)
        turn = rotation(self.spec, positions, self.output.weight.dtype)
        states = [self._embed(tokens, positions)]
        for layer in self.layers:
            states.append(layer(states[-1], turn))
        return states

    def new_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty cache for ``batch`` sequences of at most ``length`` tokens, prefix included."""
        if not self.spec.causal:
            raise ValueError("a NAR decoder attends to all positions and has no cache")
        self._check_length(length)
        weight = self.output.weight
        kind = KeyValueCache
        if weight.device.type == "cuda" and weight.dtype != torch.float64:
            from digit_ds.model.fused_cache import FusedCache  # needs Triton, which comes with CUDA builds of torch

            kind = FusedCache
        return kind(self.spec, batch, length, weight.device, weight.dtype)

    def step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Append tokens to the cached sequences.

        Args:
            tokens: int64 [B, t], the next t ids of each sequence; several at once for a prompt.
            cache: from :meth:`new_cache`; changed in place.

        Returns:
            [B, t, V] logits of the new positions.

        Raises:
            UserError: an id is outside the input table (checked on the CPU only).
            ValueError: the cache is too short (checked on the CPU only; elsewhere the caller counts).
        """
        return self.output(self.append(tokens, cache))

    def append(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """:meth:`step` without the output layer: [B, t, D], what that layer would read."""
        self._check_ids(tokens)
        if tokens.device.type == "cpu" and int(cache.position) + tokens.shape[1] > cache.length:
            raise ValueError(f"{tokens.shape[1]} tokens after {int(cache.position)} exceed the cache of {cache.length}")
        positions = cache.position + torch.arange(tokens.shape[1], device=tokens.device)  # [t]
        visible = torch.arange(cache.length, device=tokens.device) <= positions.unsqueeze(1)  # [t, length]
        turn = None if cache.rotation is None else cache.rotation.index_select(1, positions)
        hidden = self._embed(tokens, positions)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, turn, number, cache, positions, visible)
        cache.position += tokens.shape[1]
        return self.norm(hidden)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[B, T] ids at ``positions`` [T] or [B, T] of the whole sequence -> [B, T, D]."""
        scaled = math.sqrt(self.spec.width) * self.embedding(tokens)
        if self.spec.target_positions:
            scaled = scaled + self._target(positions)
        if self.spec.positions != "learned":
            return scaled
        own = positions - self.spec.prefix_length  # each table counts from its own first row
        position = self.positions((own + POSITION_OFFSET).clamp(min=POSITION_OFFSET))  # [T, D]
        if self.spec.prefix_length:
            in_prefix = (positions + POSITION_OFFSET).clamp(max=self.prefix_positions.num_embeddings - 1)
            position = torch.where((own < 0).unsqueeze(1), self.prefix_positions(in_prefix), position)
        return scaled + position

    def _target(self, positions: Tensor) -> Tensor:
        """Embedding of the place that each position predicts, [..., T, D]; the last token predicts the end, no place.

        In raster order the token at position p predicts place p, in another order the place of the token after it.
        """
        places = self.spec.tokens
        if positions.dim() == 1:
            target = positions
        else:
            target = functional.pad(positions[:, 1:] - 1, (0, 1), value=places)
        embedded = self.target_positions(target.clamp(max=places - 1))
        return torch.where((target < places).unsqueeze(-1), embedded, 0)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.output(self.norm(hidden))

    def _check_ids(self, tokens: Tensor) -> None:
        """Refuse ids outside the input table (only on the CPU: elsewhere looking would wait for the device)."""
        rows = self.embedding.num_embeddings
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= rows:
                found = low if low < 0 else high
                raise UserError(f"token id is {found}, expected 0..{rows - 1} for this {self.spec.kind} model")

    def _check_length(self, length: int) -> None:
        if length > self.spec.longest:
            raise UserError(
                f"a sequence has {length} tokens, expected at most {self.spec.longest} for this {self.spec.kind} model"
            )


def load_model(
    directory: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Load a released model for inference: one process, evaluation mode, weights frozen.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``; or ``hf://OWNER/NAME[@REVISION]``, a repository
            that holds them.
        device: where the weights go.
        dtype: what they are computed in; float16 weights become float32 exactly.

    Raises:
        UserError: the directory or a file in it is missing or damaged, or weights and config differ.
    """
    spec, state, _ = read_model(directory)
    with torch.device("meta"):
        model = Transformer(spec)
    model.load_state_dict({name: value.to(device, dtype) for name, value in state.items()}, assign=True)
    return model.eval().requires_grad_(False)
