"""The DeepSpeed engine around the Megatron model: what is built, and the few things asked of it."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from digit_ds.config import Recipe
from digit_ds.errors import UserError
from digit_ds.model import tensor_parallel
from digit_ds.model.megatron import NORM_KERNEL, MegatronTransformer, TransformerLayer, check_reductions
from digit_ds.model.partition import ShardReader
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.weights import InitialShard
from digit_ds.parallel.decide import fail_together, together
from digit_ds.parallel.frameworks import deepspeed
from digit_ds.parallel.topology import Mpu, Topology
from digit_ds.training.deepspeed_config import read_deepspeed_config
from digit_ds.training.optimizer import GuardedAdamW
from digit_ds.training.weight_gather import WeightGather
from digit_ds.training.zero import STATES, Given, Partitioner
from digit_ds.training.zero_messages import ZeroOptions


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
        dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        kind = STATES[self.stage]
        with torch.device("meta"):  # no rank holds more than it needs, not even at first
            model = MegatronTransformer(
                spec,
                recipe.model.dropout,
                recipe.training.recompute,
                recipe.training.label_smoothing,
                recipe.parallel.sequence,
            )
        with together():
            first = None if resumes else _first_weights(recipe, spec, topology)
        placeholder = 1.0 + topology.tensor_rank
        _allocate(model, placeholder, dtype, device, Partitioner(config) if kind.partitions_weights else None)
        if kind.partitions_weights:
            # Weights are gathered a layer at a time: fewer and larger messages, and no hook inside a compiled layer.
            deepspeed.utils.set_z3_leaf_modules(model, [TransformerLayer])
        pieces = recipe.training.compile and model.sequence_parallel and tensor_parallel.travels_in_pieces(device)
        if recipe.training.compile:
            model.compile_layers(pieces)
        settings = recipe.optimizer
        gather = None
        options = ZeroOptions.read(config)
        if options.gathers_beside and topology.data_size > 1:
            gather = WeightGather(model, options.group_limit(topology.data_size))
        self.optimizer = GuardedAdamW(
            [{"params": group} for group in gather.groups] if gather else model.parameters(),
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
        parameters = list(model.parameters())
        self._state = kind(Given(self._deepspeed.optimizer, self.optimizer, parameters, topology, device, gather))
        self.optimizer.global_norm = self._state.global_norm
        # Told the wrong groups, DeepSpeed copies the weights of one tensor-parallel rank to all of them.
        whole = [] if kind.partitions_weights else parameters
        if any(parameter.detach().ne(placeholder).any() for parameter in whole):
            raise RuntimeError("deepspeed.initialize changed this rank's weights")
        self.kernels = _kernels(recipe, device) + ", rows travel in pieces" * pieces
        if first is not None:
            self._set_weights(first)

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
        return self._state.last_norm()

    # --- state ---------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """Every piece of state that this rank owns, as views: together the ranks' pieces are the whole state once.

        With ZeRO a data-parallel rank owns a part of each tensor-parallel slice; without, data rank 0 owns it all.
        """
        self._state.create()
        names = ["weight", *self.optimizer.state_names]
        for name, parameter in self.model.named_parameters():
            start, view = self._state.view(parameter)
            if view is not None:
                yield Fragment(name, start, {kind: view(kind) for kind in names})

    @torch.no_grad()
    def _set_weights(self, first: ShardReader | InitialShard) -> None:
        """Give the float32 masters their first values, then the model those in its own precision.

        DeepSpeed would make masters from a bfloat16 model. A master that is itself a bfloat16 number keeps its rounded
        value until its updates add up to half the distance to the next such number; weights of similar size then
        change in the same steps.
        """
        owned = {}
        for name, parameter in self.model.named_parameters():
            start, view = self._state.view(parameter)
            if view is not None:
                owned[name] = start, view("weight")
        with together():  # before the collectives of the refresh: no rank waits there for one that cannot read
            for name, value in first.read(owned):
                start, master = owned[name]
                master.copy_(value.reshape(-1)[start : start + master.numel()])
        for master, state in self.optimizer.state.items():  # where it exists already
            if "average" in state:
                state["average"].copy_(master)
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
        self._state.refresh_model()

    @property
    def adam_steps(self) -> int:
        """Updates that were applied (skipped ones not counted)."""
        states = list(self.optimizer.state.values())
        return int(states[0]["step"]) if states else 0


def _first_weights(recipe: Recipe, spec: TransformerSpec, topology: Topology) -> ShardReader | InitialShard:
    """This rank's part of the weights that training starts from: those of a model, or drawn ones."""
    if recipe.training.start_from is None:
        return InitialShard(spec, recipe.training.seed, topology.tensor_size, topology.tensor_rank)
    source = str(recipe.training.start_from)
    reader = ShardReader(source, topology.tensor_size, topology.tensor_rank)
    for name, value in spec.to_dict().items():
        if (other := reader.spec.to_dict()[name]) != value:
            raise UserError(f"{source}: its model has {name} {other}, but the recipe and its shards make {value}")
    return reader


@torch.no_grad()
def _allocate(
    model: MegatronTransformer,
    placeholder: float,
    dtype: torch.dtype,
    device: torch.device,
    partition: Callable[[torch.nn.Parameter], None] | None,
) -> None:
    """Give the parameters, which are on the meta device, memory filled with ``placeholder``, one after the other.

    ``partition`` cuts each parameter before the next is made (ZeRO stage 3).
    """
    for module in model.modules():
        for name, described in list(module.named_parameters(recurse=False)):
            value = torch.full(described.shape, placeholder, dtype=dtype, device=device)
            parameter = torch.nn.Parameter(value)
            vars(parameter).update(vars(described))  # Megatron's marks
            setattr(module, name, parameter)
            if partition is not None:
                partition(parameter)


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
