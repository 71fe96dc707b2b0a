"""The training model: Megatron-core's tensor-parallel layers around PyTorch's attention.

State-dict names are the schema's (``weights.SCHEMA``); a rank holds the slices that ``weights.shard`` cuts. Activations
are [B, T, D]; between the column- and the row-parallel matrices each rank has its share of the heads or of the
feed-forward width, elsewhere all ranks of a tensor-parallel group hold the same values.

Dropout falls on the embeddings and both residual branches, as published. Its masks are functions of keys
(:mod:`digit_ds.model.dropout`) that come from the CPU's default generator; :func:`seed_dropout` sets it.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from digit_ds.model import tensor_parallel
from digit_ds.model.dropout import draw_keys
from digit_ds.model.dropout import dropout as hashed_dropout
from digit_ds.model.rotary import rotate, rotation
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.vocabulary_loss import vocabulary_parallel_loss
from digit_ds.model.weights import POSITION_OFFSET, check_tensor_size, padded_rows
from digit_ds.parallel.frameworks import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    parallel_state,
)

NORM_EPSILON = 1e-5
Recompute = Literal["none", "attention", "feed_forward", "layer"]

try:
    from apex.normalization import FusedLayerNorm as LayerNorm

    NORM_KERNEL = "apex FusedLayerNorm"
except ImportError:
    from torch.nn import LayerNorm

    NORM_KERNEL = "torch LayerNorm"


def _config(tensor_size: int, sequence_parallel: bool = False) -> ModelParallelConfig:
    """Megatron must neither draw weights (they come from a state dict) nor reach for a GPU that may not exist."""
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor_size,
        sequence_parallel=sequence_parallel and tensor_size > 1,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


class _Column(ColumnParallelLinear):
    """Output features split over ranks. Megatron-core decides what a rank holds; its own forward does not compile."""

    def __init__(self, *sizes: int, **options) -> None:
        super().__init__(*sizes, **options)
        self.tensor_size = self.tp_group.size()
        self.pieces = False
        """Whether gathers travel in pieces (``tensor_parallel.travels_in_pieces``)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., width / tensor size]; with sequence parallelism from this rank's rows to all rows."""
        if self.tensor_size > 1:
            sequence = self.config.sequence_parallel
            return tensor_parallel.column_product(x, self.weight, self.bias, sequence, self.pieces)
        return F.linear(x, self.weight, self.bias)


class _Row(RowParallelLinear):
    """Input features cut over ranks; the partial sums are reduced before the bias is added."""

    def __init__(self, *sizes: int, **options) -> None:
        super().__init__(*sizes, **options)
        self.tensor_size = self.tp_group.size()

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., width / tensor size] to [..., D]; with sequence parallelism from all rows to this rank's rows."""
        if self.tensor_size == 1:
            return F.linear(x, self.weight, bias)
        x = F.linear(x, self.weight)
        x = tensor_parallel.reduce_scatter(x) if self.config.sequence_parallel else tensor_parallel.reduce(x)
        return x if bias is None else x + bias


def check_reductions(device: torch.device) -> str | None:
    """What is wrong with the sums over tensor-parallel ranks, None if nothing is.

    Runs a column- and a row-parallel layer forward (the row's sum) and backward (the column's) on a tensor that is not
    contiguous, whose reduction Megatron-core 0.16.1 drops unless the layers above prevent it.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    options = {"config": _config(size), "init_method": nn.init.zeros_, "bias": False, "skip_bias_add": False}
    column = _Column(2, 2 * size, gather_output=False, **options).to(device)
    row = _Row(2 * size, 2, input_is_parallel=True, **options).to(device)
    for layer in (column, row):
        nn.init.ones_(layer.weight)
    x = torch.ones(3, 2, 2, device=device).transpose(0, 1).requires_grad_()
    y = row(column(x).transpose(0, 1), None)
    y.sum().backward()
    for name, found in (("forward", y), ("backward", x.grad)):
        assert found is not None
        if not torch.equal(found, torch.full_like(found, 4 * size)):
            return f"the {name} sum over {size} tensor-parallel ranks is {found.unique().tolist()}, expected {4 * size}"
    return None


def _norm(spec: TransformerSpec) -> nn.Module:
    """LayerNorm or RMSNorm over the width.

    PyTorch's RMSNorm is what Megatron-core's own wrapper returns without apex and Transformer Engine, for a
    configuration object that nothing here has; torch.compile fuses it.
    """
    if spec.normalization == "rms":
        return nn.RMSNorm(spec.width, eps=NORM_EPSILON)
    return LayerNorm(spec.width, eps=NORM_EPSILON)


class _QkNorm(nn.Module):
    """RMSNorm of this rank's queries and keys; the weight's two rows scale queries and keys, of all heads alike."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, spec.head_width))
        self.tensor_size = parallel_state.get_tensor_model_parallel_world_size()

    def forward(self, qk: Tensor) -> Tensor:
        """[B, T, heads, 2, D / H] to the same shape."""
        weight: Tensor = self.weight
        if self.tensor_size > 1:
            # Every rank holds the whole weight but uses only its own heads: the gradient is the sum over the ranks.
            weight = tensor_parallel.copy(weight)
        return F.rms_norm(qk, qk.shape[-1:], eps=NORM_EPSILON) * weight


class _Attention(nn.Module):
    """Self-attention over this rank's heads."""

    def __init__(self, spec: TransformerSpec, config: ModelParallelConfig) -> None:
        super().__init__()
        self.head_width = spec.head_width
        self.causal = spec.causal
        options = {"config": config, "init_method": nn.init.zeros_, "bias": True, "skip_bias_add": False}
        self.qkv = _Column(spec.width, 3 * spec.width, gather_output=False, **options)
        self.qk_norm = _QkNorm(spec) if spec.qk_norm else None
        self.out = _Row(spec.width, spec.width, input_is_parallel=True, **options)

    def forward(self, x: Tensor, bias: Tensor | None, shape: tuple[int, int], turn: Tensor | None) -> Tensor:
        """Rows [N, D] in and out; ``bias`` is that of ``out``, ``shape`` is B, T."""
        batch, length = shape
        # Rows of the fused matrix are grouped by head: for each head its q, k and v.
        qk, value = self.qkv(x).view(batch, length, -1, 3, self.head_width).split((2, 1), dim=3)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if turn is not None:
            # Megatron-core's own function rotates in the activations' precision, bfloat16, and expects [T, B, ...].
            qk = rotate(qk, turn)
        query, key = qk.transpose(1, 2).unbind(3)  # [B, heads, T, D / H] each
        value = value.squeeze(3).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch * length, -1), bias)


class _FeedForward(nn.Module):
    """Two matrices with an exact (erf) GELU between them."""

    def __init__(self, spec: TransformerSpec, config: ModelParallelConfig) -> None:
        super().__init__()
        options = {"config": config, "init_method": nn.init.zeros_, "bias": True, "skip_bias_add": False}
        self.up = _Column(spec.width, spec.feed_forward, gather_output=False, **options)
        self.down = _Row(spec.feed_forward, spec.width, input_is_parallel=True, **options)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.down(F.gelu(self.up(x)), bias)


class _GatedFeedForward(nn.Module):
    """SwiGLU; the rows of ``gate_up`` lie in pairs, so that a rank's slice has the gates of its own numbers."""

    def __init__(self, spec: TransformerSpec, config: ModelParallelConfig) -> None:
        super().__init__()
        options = {"config": config, "init_method": nn.init.zeros_, "bias": True, "skip_bias_add": False}
        self.gate_up = _Column(spec.width, 2 * spec.feed_forward, gather_output=False, **options)
        self.down = _Row(spec.feed_forward, spec.width, input_is_parallel=True, **options)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        gate, up = self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * up, bias)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each a residual branch with its norm before (pre) or after the sum (post)."""

    def __init__(
        self, spec: TransformerSpec, config: ModelParallelConfig, dropout: float, recompute: Recompute
    ) -> None:
        super().__init__()
        self.attention = _Attention(spec, config)
        self.attention_norm = _norm(spec)
        self.ffn = (_FeedForward if spec.activation == "gelu" else _GatedFeedForward)(spec, config)
        self.ffn_norm = _norm(spec)
        self.pre_norm = spec.norm_position == "pre"
        self.dropout = dropout
        self.recompute = recompute
        self.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor, shape: tuple[int, int], turn: Tensor | None, keys: Tensor | None) -> Tensor:
        """Rows [N, D] of ``shape`` B, T: N = B T, or this rank's share of them with sequence parallelism.

        ``keys`` int32 [2, 2] are those of the dropout masks of both branches; None: no dropout.
        """
        norms = (self.attention_norm, self.ffn_norm)
        whole = [self.attention.out.bias, self.ffn.down.bias, *(p for norm in norms for p in norm.parameters())]
        if self.sequence_parallel:
            # Every rank holds these whole but uses only its own rows: their gradients are sums over the ranks.
            whole = list(tensor_parallel.copy_all(*whole))
        out_bias, down_bias, *scales = whole
        half = len(scales) // 2
        attention = self._branch("attention", self.attention, out_bias, shape, turn)
        ffn = self._branch("feed_forward", self.ffn, down_bias)
        if self.pre_norm:
            x = x + self._drop(attention(_apply(norms[0], x, scales[:half])), keys, 0)
            return x + self._drop(ffn(_apply(norms[1], x, scales[half:])), keys, 1)
        x = _apply(norms[0], x + self._drop(attention(x), keys, 0), scales[:half])
        return _apply(norms[1], x + self._drop(ffn(x), keys, 1), scales[half:])

    def _branch(self, name: Recompute, function: nn.Module, *arguments: Any) -> Callable[[Tensor], Tensor]:
        """A residual branch of its rows, recomputed in the backward pass where configured."""
        if self.recompute == name and self.training:
            return lambda x: checkpoint(function, x, *arguments, use_reentrant=False, preserve_rng_state=False)
        return lambda x: function(x, *arguments)

    def _drop(self, x: Tensor, keys: Tensor | None, branch: int) -> Tensor:
        if keys is None:
            return x
        return hashed_dropout(
            x, self.dropout, keys[branch], tensor_parallel.first_row(x) if self.sequence_parallel else 0
        )


def _apply(norm: nn.Module, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """``norm`` with its parameters taken from ``parameters``."""
    if isinstance(norm, nn.LayerNorm):
        weight, bias = parameters
        return F.layer_norm(x, list(norm.normalized_shape), weight, bias, norm.eps)
    if isinstance(norm, nn.RMSNorm):
        (scale,) = parameters
        return F.rms_norm(x, list(norm.normalized_shape), scale, norm.eps)
    return torch.func.functional_call(norm, dict(zip(("weight", "bias"), parameters)), (x,))


class MegatronTransformer(nn.Module):
    """The transformer of ``spec``, cut over Megatron's tensor-parallel group (which must exist).

    Weights are uninitialised until a state dict of :func:`digit_ds.model.weights.shard` is loaded.

    Args:
        dropout: on the embeddings and both residual branches.
        recompute: what of a layer is computed again in the backward pass instead of kept.
        sequence_parallel: between the matrices a tensor-parallel rank holds 1 / tensor size of the B T rows, which must
            divide.
        smoothing: label smoothing of :meth:`forward` with a target.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        dropout: float = 0.0,
        recompute: Recompute = "none",
        smoothing: float = 0.0,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.dropout = dropout
        self._drop: Callable[..., Tensor] = hashed_dropout
        self.recompute = recompute
        self.smoothing = smoothing
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        check_tensor_size(spec, tensor_size)
        config = _config(tensor_size, sequence_parallel)
        self.sequence_parallel = config.sequence_parallel
        vocabulary = spec.vocabulary
        self.embedding = VocabParallelEmbedding(
            padded_rows(vocabulary.embedding_rows), spec.width, init_method=nn.init.zeros_, config=_config(tensor_size)
        )
        rows, learned = spec.max_positions + POSITION_OFFSET, spec.positions == "learned"
        self.positions = nn.Embedding(rows, spec.width) if learned else None
        self.prefix_positions = nn.Embedding(rows, spec.width) if learned and vocabulary.has_prefix else None
        self.target_positions = nn.Embedding(spec.tokens, spec.width) if spec.target_positions else None
        self.layers = nn.ModuleList(TransformerLayer(spec, config, dropout, recompute) for _ in range(spec.layers))
        self.norm = _norm(spec) if spec.norm_position == "pre" else None
        self.output = _Column(
            spec.width,
            padded_rows(vocabulary.output_size),
            gather_output=False,
            bias=False,
            config=_config(tensor_size),
            init_method=nn.init.zeros_,
        )
        self._mark_tensor_parallel()

    def _mark_tensor_parallel(self) -> None:
        """Mark the parameters that are slices: without the mark DeepSpeed leaves all but one rank's out of the norm."""
        for module in self.modules():
            if isinstance(module, _Column | VocabParallelEmbedding):
                sliced = list(module.parameters(recurse=False))
            elif isinstance(module, _Row):
                sliced = [module.weight]
            else:
                continue
            for parameter in sliced:
                parameter.tensor_model_parallel = True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]  # overloads
        """Parameters under the schema's names (Megatron's layers add empty ``_extra_state`` entries of their own)."""
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.endswith("_extra_state")]:
            del state[name]
        return state

    def forward(
        self,
        tokens: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This rank's logits, or the loss of a batch.

        Args:
            tokens: int64 [B, T].
            target: int64 [B, T'] for the last T' positions.
            mask: [B, T'], weights of the positions (bool or float); None: all count.
            order: int64 [B, G] as in :class:`digit_ds.model.sequences.Sequence`; None: raster.

        Returns:
            Without ``target`` this rank's share of the padded logits [B, T, V / tensor size]; with it the
            label-smoothed loss and the plain negative log-likelihood, both means in nats over the true vocabulary.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        if order is not None:
            positions = F.pad(order + 1, (1, 0))  # [B, T]: the start token stands before the image
        x = self._embed(tokens, positions)
        turn = rotation(self.spec, positions, x.dtype)
        shape = x.shape[0], x.shape[1]
        x = x.flatten(0, 1)  # [B T, D]
        keys: list[Tensor | None] = [None] * len(self.layers)
        if self.training and self.dropout:
            own, *keys = draw_keys(2 * (1 + len(self.layers)), x.device).split(2)
            x = self._drop(x, self.dropout, own[0])
        if self.sequence_parallel:
            x = tensor_parallel.scatter(x)
        for layer, key in zip(self.layers, keys):
            if self.recompute == "layer" and self.training:
                x = checkpoint(layer, x, shape, turn, key, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, shape, turn, key)
        if self.sequence_parallel:
            x = tensor_parallel.join(x)
        x = x.unflatten(0, shape)
        if self.norm is not None:
            x = self.norm(x)
        if target is None:
            return self.output(x)
        logits = self.output(x[:, -target.shape[1] :].contiguous())  # [B, T', V / tensor size]
        size = self.spec.vocabulary.output_size
        return vocabulary_parallel_loss(logits, target, size, self.smoothing, mask)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Scaled token embedding -> [B, T, D], learned positions added; prefix and image count theirs separately."""
        x = math.sqrt(self.spec.width) * self.embedding(tokens)
        if self.positions is not None:
            x = x + self._learned_positions(positions)
        if self.target_positions is not None:
            x = x + self._target(positions)
        return x

    def _learned_positions(self, positions: Tensor) -> Tensor:
        """[T, D] or [B, T, D] for ``positions`` [T] or [B, T]."""
        prefix, place = self.spec.prefix_length, positions + POSITION_OFFSET
        assert self.positions is not None
        learned = self.positions(place[..., : place.shape[-1] - prefix])
        if self.prefix_positions is not None:
            learned = torch.cat([self.prefix_positions(place[:prefix]), learned])
        return learned

    def _target(self, positions: Tensor) -> Tensor:
        """[T, D] or [B, T, D]: embedding of the place that each position predicts; the last predicts the end."""
        assert self.target_positions is not None
        places = positions[..., 1:] - 1
        return F.pad(self.target_positions(places), (0, 0, 0, 1))

    def compile_layers(self, pieces: bool = False) -> None:
        """Compile each layer; all layers have one shape, so the first compilation serves the others.

        Hooks stay outside: those of ZeRO 3 gather the layer's weights before it and free them after it. ``pieces``:
        rows of sequence parallelism travel in pieces (``tensor_parallel.travels_in_pieces``).
        """
        options: dict[str, Any] | None = None
        if pieces:
            options = {"_micro_pipeline_tp": True}
            for module in self.layers.modules():
                if isinstance(module, _Column):
                    module.pieces = True
        elif tensor_parallel.size() > 1:
            # Reordering lets the sums of input gradients over tensor-parallel ranks pass beside the weights' products.
            options = {"reorder_for_compute_comm_overlap": True}
        # Under ZeRO 3 the compiler cannot look into DeepSpeed's dictionaries of parameters and compiles layer by layer;
        # with its usual limit of 8 the other layers would run uncompiled.
        dynamo, limit = torch._dynamo.config, 8 * len(self.layers)
        dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 2 * limit)
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, options=options)
        self._drop = torch.compile(hashed_dropout)


def seed_dropout(seed: int, step: int, chunk: int) -> None:
    """Set the default generators for one micro-batch.

    The seed says which micro-batch of the global batch it is, not which rank computes it: tensor-parallel ranks draw
    equal masks (they hold equal activations), data-parallel ones different masks, and a resumed run, at whatever
    layout, draws what the uninterrupted one would have drawn.
    """
    torch.manual_seed(hash((seed, step, chunk)) & (2**63 - 1))
