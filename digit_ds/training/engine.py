"""The DeepSpeed engine around the Megatron model: what is built, and the few things asked of it."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when DeepSpeed is first imported

import deepspeed
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from megatron.core import parallel_state
from torch import Tensor

from digit_ds.config import Recipe
from digit_ds.errors import UserError
from digit_ds.model import weights
from digit_ds.model.megatron import NORM_KERNEL, MegatronTransformer, TransformerLayer, check_reductions
from digit_ds.model.partition import read_shard
from digit_ds.model.spec import TransformerSpec
from digit_ds.parallel.decide import fail_together, together
from digit_ds.parallel.topology import Mpu, Topology
from digit_ds.training.deepspeed_config import read_deepspeed_config
from digit_ds.training.optimizer import GuardedAdamW

# On CPUs DeepSpeed would compile a shared-memory all-reduce at first use, for minutes; gloo needs no compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter's float32 master weights or of an optimizer state of the same shape."""

    name: str
    """Parameter name in the schema."""
    start: int
    """First element of the part within the flattened tensor-parallel slice."""
    tensors: dict[str, Tensor]
    """``weight``, ``exp_avg``, ``exp_avg_sq`` and, with a moving average, ``average``: flat views of the live state."""


class Engine:
    """A model in training on this process: forward, backward, update, and access to its state."""

    def __init__(
        self,
        recipe: Recipe,
        spec: TransformerSpec,
        topology: Topology,
        device: torch.device,
        resumes: bool = False,
    ) -> None:
        """``resumes``: ``restore`` will give the weights; none are drawn, and ``training.start_from`` is not read."""
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        config = read_deepspeed_config(recipe, topology.data_size)
        self.topology = topology
        self.device = device
        self.stage: int = config.get("zero_optimization", {}).get("stage", 0)
        model = MegatronTransformer(
            spec,
            recipe.model.dropout,
            recipe.training.recompute,
            recipe.training.label_smoothing,
            recipe.parallel.sequence,
        )
        first: weights.State | None = None  # kept until the masters are there
        if resumes:
            _fill(model, _placeholders(model, topology))
        elif recipe.training.start_from is None:
            drawn = weights.initial_shard(spec, recipe.training.seed, topology.tensor_size, topology.tensor_rank)
            _fill(model, drawn)
        else:
            with together():
                first = _first_weights(recipe, spec, topology)
            _fill(model, first.items())
        dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        before = fingerprint(model, dtype) if topology.world_size > 1 and self.stage < 3 else None
        if self.stage == 3:
            # Weights are gathered a layer at a time: fewer and larger messages, and no hook inside a compiled layer.
            set_z3_leaf_modules(model, [TransformerLayer])
        if recipe.training.compile:
            model.compile_layers()
        settings = recipe.optimizer
        self.optimizer = GuardedAdamW(
            model.parameters(),
            learning_rate=0.0,
            betas=settings.betas,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
            clipping=settings.gradient_clipping,
            average_decay=recipe.training.ema_decay,
        )
        self._deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=config,
            mpu=Mpu(),
            dist_init_required=False,
        )
        self.model: MegatronTransformer = model
        self._zero: Any = self._deepspeed.optimizer
        self.optimizer.global_norm = self._stage_zero_norm if self.stage == 0 else lambda: self._zero._global_grad_norm
        if before is not None and fingerprint(model, dtype) != before:
            raise RuntimeError("deepspeed.initialize changed this rank's weights")
        self.kernels = _kernels(recipe, device)
        if first is not None:
            self._set_master_weights(first)

    def train(self) -> None:
        """Dropout on."""
        self.model.train()

    def evaluate(self) -> None:
        """Dropout off."""
        self.model.eval()

    def loss(
        self, tokens: Tensor, target: Tensor, mask: Tensor | None, order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and nll of a micro-batch, see ``MegatronTransformer.forward``."""
        return self._deepspeed(tokens, target, mask, order)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch; the last one of a step reduces over data-parallel ranks."""
        self._deepspeed.backward(loss)

    def step(self, learning_rate: float) -> None:
        """Call after each backward; the last one of a step updates the weights."""
        if self._deepspeed.is_gradient_accumulation_boundary():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        self._deepspeed.step()

    @property
    def gradient_norm(self) -> Tensor | float:
        """Norm of the whole model's gradient before clipping in the last step; negative or not finite: skipped."""
        return self.optimizer.last_norm if self.stage == 0 else self._zero._global_grad_norm

    def _stage_zero_norm(self) -> Tensor:
        """Without ZeRO: each slice counted once, replicated parameters once over the tensor-parallel group."""
        sliced: list[Tensor] = []
        whole: list[Tensor] = []
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                kind = sliced if getattr(parameter, "tensor_model_parallel", False) else whole
                kind.append(parameter.grad)
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradients, counted in ((sliced, True), (whole, self.topology.tensor_rank == 0)):
            if gradients and counted:
                square += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        dist.all_reduce(square, group=parallel_state.get_tensor_model_parallel_group())
        return square.sqrt().float()

    # --- state ---------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """Every piece of state that this rank owns, as views: together the ranks' pieces are the whole state once.

        With ZeRO a data-parallel rank owns a part of each tensor-parallel slice; without, data rank 0 owns it all.
        """
        self._create_state()
        names = ["weight", *self.optimizer.state_names]
        for name, parameter in self.model.named_parameters():
            start, view = self._view(parameter)
            if view is not None:
                yield Fragment(name, start, {kind: view(kind) for kind in names})

    def _view(self, parameter: Any) -> tuple[int, Callable[[str], Tensor] | None]:
        """First element and accessor of this rank's part of a parameter's state; None where it owns nothing."""
        if self.stage == 0:
            if self.topology.data_rank:
                return 0, None
            return 0, lambda kind: self._whole(parameter, kind).view(-1)
        if self.stage == 3:
            rank, size = dist.get_rank(parameter.ds_process_group), parameter.partition_numel()
            length = min(size, parameter.ds_numel - rank * size)  # the last part is padded
            if length <= 0:
                return 0, None
            # DeepSpeed's public accessor of this partition copies it to the device under offload.
            part = self._zero._get_fp32_opt_state_partition
            return rank * size, lambda kind: part(parameter, False, None if kind == "weight" else kind)[0][:length]
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, None
        start = mapping.lp_fragment_address.start
        return start, lambda kind: mapping.get_hp_fragment(None if kind == "weight" else kind)

    def _whole(self, parameter: Tensor, kind: str) -> Tensor:
        """State of a parameter without ZeRO."""
        return parameter.data if kind == "weight" else self.optimizer.state[parameter][kind]

    def _create_state(self) -> None:
        """Optimizer states exist from the first step on; a checkpoint may be wanted before it."""
        if self.stage == 3:
            self.optimizer.create_state(self._zero.fp32_partitioned_groups_flat)
        else:
            self.optimizer.create_state()
        if self.stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _set_master_weights(self, state: weights.State) -> None:
        """Give the masters the float32 values of which DeepSpeed only saw those in the compute precision."""
        for fragment in self.fragments():
            for kind in {"weight", "average"} & fragment.tensors.keys():
                tensor = fragment.tensors[kind]
                tensor.copy_(state[fragment.name].reshape(-1)[fragment.start : fragment.start + tensor.numel()])
        self.refresh_model()

    @torch.no_grad()
    def restore(self, read: Callable[[str, str, int, int], Tensor], adam_steps: int) -> None:
        """Fill this rank's state, piece by piece.

        ``read(kind, name, start, end)`` gives elements of this rank's flattened tensor-parallel slice of a parameter.
        """
        fragments = list(self.fragments())
        with together():  # before the collectives below: no rank waits there for one that cannot read
            for fragment in fragments:
                for kind, tensor in fragment.tensors.items():
                    tensor.copy_(read(kind, fragment.name, fragment.start, fragment.start + tensor.numel()))
        for state in self.optimizer.state.values():
            state["step"].fill_(adam_steps)
        self.refresh_model()

    def refresh_model(self) -> None:
        """Bring what every rank's forward pass reads up to the restored master weights."""
        if self.stage == 0:
            group = parallel_state.get_data_parallel_group()
            owner = dist.get_process_group_ranks(group)[0]
            for parameter in self.model.parameters():
                for kind in ("weight", *self.optimizer.state_names):
                    dist.broadcast(self._whole(parameter, kind), owner, group=group)
        elif self.stage == 3:
            zero = self._zero
            zero.checkpoint_event_prologue()
            for model, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat):
                model.data.copy_(master.data)
            zero.checkpoint_event_epilogue()
        else:
            self._zero.update_lp_params()

    @property
    def adam_steps(self) -> int:
        """Updates that were applied (skipped ones not counted)."""
        states = list(self.optimizer.state.values())
        return int(states[0]["step"]) if states else 0


def _first_weights(recipe: Recipe, spec: TransformerSpec, topology: Topology) -> weights.State:
    """This rank's part of the weights of the model that training starts from, float32."""
    source = str(recipe.training.start_from)
    found, state = read_shard(source, topology.tensor_size, topology.tensor_rank)
    for name, value in spec.to_dict().items():
        if (other := found.to_dict()[name]) != value:
            raise UserError(f"{source}: its model has {name} {other}, but the recipe and its shards make {value}")
    return {name: value.float() for name, value in state.items()}


def _placeholders(model: MegatronTransformer, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """Values until a checkpoint is read: other ones on each tensor-parallel rank, for the comparison after start."""
    for name, parameter in model.named_parameters():
        yield name, torch.full((), 1.0 + topology.tensor_rank).expand(parameter.shape)


@torch.no_grad()
def _fill(model: MegatronTransformer, values: Iterable[tuple[str, Tensor]]) -> None:
    """Set all parameters, one after the other."""
    parameters = dict(model.named_parameters())
    for name, value in values:
        parameters.pop(name).copy_(value)
    assert not parameters, f"not set: {list(parameters)}"


def fingerprint(model: torch.nn.Module, dtype: torch.dtype) -> list[int]:
    """Two sums of every parameter's bits in ``dtype``: changes when any value does.

    Whole numbers, since a sum of floats would differ between CPU and GPU, which add in another order.
    """
    pattern = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    sums = []
    for parameter in model.parameters():
        bits = parameter.detach().to(dtype).contiguous().view(pattern).long()
        sums += [int(bits.sum()), int((bits * bits).sum())]  # products beyond 64 bits wrap around, equally everywhere
    return sums


def _kernels(recipe: Recipe, device: torch.device) -> str:
    """Which implementations this run uses, for the log."""
    attention = "SDPA (flash or cuDNN)" if device.type == "cuda" else "SDPA"
    compiled = "layers and loss compiled" if recipe.training.compile else "layers not compiled"
    norm = NORM_KERNEL if recipe.model.normalization == "layer" else "torch RMSNorm"
    return f"{attention}, {norm}, fused AdamW, {compiled}"


def check_start() -> None:
    """Refuse to train where tensor-parallel layers lose a reduction.

    Raises:
        UserError: on rank 0; the other ranks leave with it.
    """
    fail_together(check_reductions(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
