"""What ranks send each other in a step of training, and about how long that takes.

Bytes are those of the whole tensor that a collective is about. A ring over ``n`` ranks moves ``(n - 1) / n`` of them
over every rank's link for a gather or a reduce-scatter, twice that for a sum.
"""

from dataclasses import dataclass
from typing import Literal

from digit_ds.config import Recipe
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.estimate import device_parameters, zero_of

Operation = Literal["all_reduce", "reduce_scatter", "all_gather"]


@dataclass(frozen=True)
class Collective:
    """Equal collectives of one step."""

    group: Literal["tensor", "data"]
    operation: Operation
    count: int
    bytes: int
    """Of one of them, the whole tensor."""

    def seconds(self, ranks: int, gigabytes: float) -> float:
        """All of them over ``ranks`` with links of so many 10^9 bytes a second and direction."""
        turns = 2 if self.operation == "all_reduce" else 1
        return turns * (ranks - 1) / ranks * self.count * self.bytes / (gigabytes * 1e9)


def tensor_traffic(recipe: Recipe, spec: TransformerSpec) -> list[Collective]:
    """Between the matrices of one micro-batch, forward and backward (arXiv 1909.08053; 2205.05198, figure 5).

    A layer has two pairs of matrices, each with a sum forward and one backward; with ``parallel.sequence`` each sum is
    a reduce-scatter and a gather. The embedding and the output matrix add one each.
    """
    if recipe.parallel.tensor == 1:
        return []
    assert recipe.training.micro_batch != "auto"
    low = 2 if recipe.training.precision == "bf16" else 4
    rows = recipe.training.micro_batch * spec.sequence_length * spec.width * low
    ends = Collective("tensor", "all_reduce", 2, rows)
    if not recipe.parallel.sequence:
        return [Collective("tensor", "all_reduce", 4 * spec.layers, rows), ends]
    return [
        Collective("tensor", "all_gather", 4 * spec.layers + 2, rows),
        Collective("tensor", "reduce_scatter", 4 * spec.layers, rows),
        ends,
    ]


def data_traffic(recipe: Recipe, spec: TransformerSpec, micro_batches: int) -> list[Collective]:
    """Gradients and weights of one step between data-parallel ranks, whose tensor-parallel slices are equally large.

    Gradients are float32. ZeRO 1 sums them whole and gathers the weights; 2 sums bucket by bucket (DeepSpeed's default
    for buckets of several owners) and gathers the weights; 3 reduce-scatters the gradients of every micro-batch and
    gathers the weights for its forward and again for its backward pass.
    """
    low = 2 if recipe.training.precision == "bf16" else 4
    count, (stage, _) = device_parameters(spec, recipe.parallel.tensor), zero_of(recipe)
    if stage == 3:
        return [
            Collective("data", "all_gather", 2 * micro_batches, count * low),
            Collective("data", "reduce_scatter", micro_batches, count * 4),
        ]
    passes = micro_batches if stage == 2 else 1  # stage 2 keeps no gradient of other ranks' parts
    gathered = [Collective("data", "all_gather", 1, count * low)] if stage else []
    return [Collective("data", "all_reduce", passes, count * 4), *gathered]
