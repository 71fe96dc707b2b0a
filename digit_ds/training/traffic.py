"""What ranks send each other in a step of training, and about how long that takes.

Bytes are those of the whole tensor that a collective is about. A ring over ``n`` ranks moves ``(n - 1) / n`` of them
over every rank's link for a gather or a reduce-scatter, twice that for a sum. Messages and bytes are those that
``benchmarks/traffic_counts.py`` counts in real runs (docs/scaling.md, tests/test_traffic.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from digit_ds.config import Recipe
from digit_ds.files import read_json
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.deepspeed_config import find_config
from digit_ds.training.estimate import zero_of
from digit_ds.training.zero_messages import (
    ZeroOptions,
    flat_elements,
    gathered_messages,
    gradient_sizes,
    persistent,
    scattered_messages,
    sizes_by_module,
    summed_messages,
    weight_groups,
)

Operation = Literal["all_reduce", "reduce_scatter", "all_gather"]


class Protocol(NamedTuple):
    """A way in which NCCL moves data: microseconds of a message and of a hop, and the share of the link's speed."""

    start: float
    hop: float
    """Within a host."""
    far_hop: float
    """Between hosts."""
    share: float


# NCCL's own model of its speed, src/graph/tuning.cc, for LL, LL128 and Simple; NVLink within a host.
RING = (Protocol(6.6, 0.6, 2.7, 0.5), Protocol(14.0, 1.9, 4.0, 0.92), Protocol(8.4, 3.4, 14.0, 1.0))
TREE = (Protocol(6.8, 0.6, 5.0, 0.46), Protocol(14.0, 1.25, 8.5, 0.85), Protocol(8.4, 4.0, 14.0, 0.92))


@dataclass(frozen=True)
class Collective:
    """Equal collectives of one step."""

    group: Literal["tensor", "data"]
    operation: Operation
    count: int
    bytes: int
    """Of one of them, the whole tensor."""
    beside: bool = False
    """Issued while the device computes on."""

    def sent(self, ranks: int) -> float:
        """Bytes of all of them that leave each of ``ranks`` around a ring."""
        turns = 2 if self.operation == "all_reduce" else 1
        return turns * (ranks - 1) / ranks * self.count * self.bytes

    def seconds(self, ranks: int, gigabytes: float, hosts: int = 1) -> float:
        """All of them over ``ranks`` on ``hosts`` with links of so many 10^9 bytes a second and direction.

        The fastest of NCCL's protocols, around a ring or, for sums, also up and down a tree.
        """
        if ranks == 1:
            return 0.0
        turns = 2 if self.operation == "all_reduce" else 1
        moved = self.sent(ranks) / self.count / (gigabytes * 1e9)
        far = turns * (hosts - 1)
        ways = [(way, turns * (ranks - 1) - far, far) for way in RING]
        if self.operation == "all_reduce":
            ways += [(way, 2 * (ranks // hosts - 1), 2 * (hosts - 1).bit_length()) for way in TREE]
        one = min(
            (way.start + near * way.hop + far * way.far_hop) * 1e-6 + moved / way.share for way, near, far in ways
        )
        return self.count * one


def tensor_traffic(recipe: Recipe, spec: TransformerSpec) -> list[Collective]:
    """Between the matrices of one micro-batch, forward and backward (arXiv 1909.08053; 2205.05198, figure 5).

    A layer has two pairs of matrices, each with a sum forward and one backward; with ``parallel.sequence`` each sum is
    a reduce-scatter and a gather. The embedding and the output matrix add one each, the loss two sums of a few numbers
    a token. What is recomputed travels again, up to the last sum that the backward pass needs.
    """
    if recipe.parallel.tensor == 1:
        return []
    assert recipe.training.micro_batch != "auto"
    low = 2 if recipe.training.precision == "bf16" else 4
    images, layers, recompute = recipe.training.micro_batch, spec.layers, recipe.training.recompute
    rows, targets = (images * length for length in (spec.sequence_length, spec.tokens + 1))
    activations = rows * spec.width * low
    ends = [
        Collective("tensor", "all_reduce", 1, activations),
        Collective("tensor", "all_reduce", 1, targets * spec.width * low),
        Collective("tensor", "all_reduce", 1, targets * 4),
        Collective("tensor", "all_reduce", 1, targets * 3 * 4),
    ]
    if spec.qk_norm:
        ends.append(Collective("tensor", "all_reduce", layers, 2 * spec.head_width * low))
    last = spec.norm_position == "post" or recipe.model.dropout > 0  # something after a layer's last sum needs it
    again = 1 + last if recompute == "layer" else 0
    if not recipe.parallel.sequence:
        return [Collective("tensor", "all_reduce", (4 + again) * layers, activations), *ends]
    gathers = {"none": 4, "attention": 5, "feed_forward": 5, "layer": 6}[recompute]
    whole = 2 + 2 * (2 if spec.normalization == "layer" else 1)  # biases and norms, which all ranks hold
    return [
        Collective("tensor", "all_gather", gathers * layers + 2, activations),
        Collective("tensor", "reduce_scatter", (4 + again) * layers, activations),
        Collective("tensor", "all_reduce", layers, whole * spec.width * low),
        *ends,
    ]


def data_traffic(recipe: Recipe, spec: TransformerSpec, data_size: int, micro_batches: int) -> list[Collective]:
    """Gradients, weights and the gradient's norm of one step between data-parallel ranks.

    Gradients are float32, or of the file's ``communication_data_type``. ZeRO 1 in bf16 sums them whole and gathers the
    weights; 2 sums bucket by bucket (DeepSpeed's default for buckets of several owners) and gathers the weights, with
    ``overlap_comm`` by group; 3 reduce-scatters the gradients of every micro-batch and gathers the weights for its
    forward and again for its backward pass, but for those that it still holds. Gathers by group overlap with the next
    forward pass.
    """
    if data_size == 1:
        return []
    bf16, tensor = recipe.training.precision == "bf16", recipe.parallel.tensor
    low = 2 if bf16 else 4
    config = read_json(find_config(recipe.deepspeed))
    options, sent = ZeroOptions.read(config), 2 if config.get("communication_data_type") == "bf16" else 4
    modules = sizes_by_module(spec, tensor)
    sizes = [size for module in modules for size in module]
    gradients = gradient_sizes(spec, tensor, recipe.parallel.sequence, options.stage)
    beside = options.overlap_comm
    if options.stage == 3:
        gathers = gathered_messages(modules, options, data_size, micro_batches)
        return [
            *_equal("all_gather", gathers, low, micro_batches, beside),
            *_equal("reduce_scatter", scattered_messages(gradients, options, data_size), sent, micro_batches, beside),
            *_equal("all_gather", persistent(sizes, options, data_size), low),
            *_equal("all_reduce", [1], _norm_bytes(recipe)),
        ]
    groups = weight_groups(modules, options, data_size)
    parts = [flat_elements(group, data_size) for group in groups]
    gathered = _equal("all_gather", parts, low, beside=options.gathers_beside)
    if options.stage == 0:
        return _equal("all_reduce", [sum(sizes)], 4)
    if options.stage == 1 and bf16:
        return [*_equal("all_reduce", [flat_elements(sizes, data_size)], 4), *gathered]
    passes = micro_batches if options.stage == 2 else 1  # stage 2 keeps no gradient of other ranks' parts
    sums = summed_messages(gradients, groups, options, data_size)
    summed = _equal("all_reduce", sums, sent, passes, beside and options.stage == 2)
    return [*summed, *gathered, *_equal("all_reduce", [1], _norm_bytes(recipe))]


def norm_traffic(recipe: Recipe) -> list[Collective]:
    """The gradient's norm of one step over the tensor-parallel ranks."""
    if recipe.parallel.tensor == 1:
        return []
    return [Collective("tensor", "all_reduce", 1, _norm_bytes(recipe))]


def _norm_bytes(recipe: Recipe) -> int:
    """DeepSpeed adds up the norm in float64 under ZeRO 3, as we do without ZeRO, but for offloaded states."""
    stage, offload = zero_of(recipe)
    return 8 if stage in (0, 3) and not offload else 4


def mailbox_messages(ranks: int, tensor_size: int) -> tuple[int, int]:
    """Messages of all ranks together in a step's exchange of small numbers, and bytes of each (``Mailbox``).

    The numbers are a stop, two of checkpoints, the samples' hash and one for each tensor-parallel rank.
    """
    core = 1 << (ranks.bit_length() - 1)
    return core * (core.bit_length() - 1) + 2 * (ranks - core), 8 * (4 + tensor_size)


def _equal(
    operation: Operation, elements: Iterable[int], size: int, times: int = 1, beside: bool = False
) -> list[Collective]:
    """Data-parallel collectives of so many elements of ``size`` bytes, equal ones as one entry."""
    counts: dict[int, int] = {}
    for number in elements:
        counts[number] = counts.get(number, 0) + times
    return [Collective("data", operation, count, number * size, beside) for number, count in counts.items()]
