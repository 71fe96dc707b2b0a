"""Elements of each message that DeepSpeed makes of a model's parameters in a step.

Gradients are sent in buckets, in the order of the backward pass; weights under ZeRO 3 by the trace of the modules, some
ahead of their use. Sizes follow from the parameters and the options of the DeepSpeed file alone. Sources:
DeepSpeed 0.19, ``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``partitioned_param_coordinator.py``.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from digit_ds.model import weights
from digit_ds.model.spec import TransformerSpec


@dataclass(frozen=True)
class ZeroOptions:
    """Options of ``zero_optimization`` that decide over messages, in elements; the defaults are DeepSpeed's."""

    stage: int = 0
    overlap_comm: bool = False
    offloads: bool = False
    """Whether the optimizer's states are in host memory."""
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000

    @classmethod
    def read(cls, config: dict[str, Any]) -> "ZeroOptions":
        """Of a DeepSpeed configuration."""
        zero = config.get("zero_optimization", {})
        found = {name: zero[name] for name in cls.__dataclass_fields__ if name in zero}
        return cls(**found | {"offloads": (zero.get("offload_optimizer") or {}).get("device") == "cpu"})

    @property
    def gathers_beside(self) -> bool:
        """Whether updated weights are sent while the next forward pass computes, by group (``WeightGather``)."""
        return self.stage == 2 and self.overlap_comm and not self.offloads

    def group_limit(self, ranks: int) -> int:
        """Elements of a group, of which each rank sends its part."""
        return self.allgather_bucket_size * ranks


LAYER = (
    *("attention.qkv", "attention.qk_norm", "attention.out", "attention_norm"),
    *("ffn.gate_up", "ffn.up", "ffn.down", "ffn_norm"),
)
"""Modules of a layer in the order of the forward pass."""


def _by_module(spec: TransformerSpec) -> list[list[weights.Parameter]]:
    """Parameters in the schema's order, by module in that of the forward pass; a layer is one, as it is for ZeRO 3."""

    def module(parameter: weights.Parameter) -> str:
        path = parameter.name.split(".")
        return ".".join(path[:2] if path[0] == "layers" else path[:-1])

    return [list(group) for _, group in itertools.groupby(weights.parameters(spec), module)]


def _size(parameter: weights.Parameter, tensor_size: int) -> int:
    return math.prod(weights.shard_shape(parameter, tensor_size))


def sizes_by_module(spec: TransformerSpec, tensor_size: int) -> list[list[int]]:
    """Elements of one tensor-parallel rank's parameters, by module."""
    return [[_size(parameter, tensor_size) for parameter in module] for module in _by_module(spec)]


def gradient_sizes(spec: TransformerSpec, tensor_size: int, sequence: bool, stage: int) -> list[int]:
    """Elements of the gradients in the order in which the backward pass hands them to DeepSpeed.

    From the last module to the first. Under sequence parallelism those that all tensor-parallel ranks hold come at the
    end of their layer, where they are summed; under stage 3 a layer's come together, from its first module on.
    """

    def place(parameter: weights.Parameter) -> tuple[bool, int]:
        if not parameter.name.startswith("layers."):
            return False, 0
        module = LAYER.index(parameter.name.split(".", 2)[2].rpartition(".")[0])
        return sequence and parameter.split_dim is None and stage < 3, module if stage == 3 else -module

    found = []
    for module in reversed(_by_module(spec)):
        parameters = module if stage == 3 else reversed(module)
        found += [_size(parameter, tensor_size) for parameter in sorted(parameters, key=place)]
    return found


def padded(elements: int, ranks: int) -> int:
    """Elements that ``ranks`` equal parts hold."""
    return -(-elements // ranks) * ranks


def weight_groups(modules: Sequence[Sequence[int]], options: ZeroOptions, ranks: int) -> list[list[int]]:
    """Sizes of the parameters of each group that stages 1 and 2 cut and gather by itself."""
    if not options.gathers_beside:
        return [[size for module in modules for size in module]]
    groups = consecutive(map(sum, modules), options.group_limit(ranks))
    return [[size for number in group for size in modules[number]] for group in groups]


def flat_elements(sizes: Iterable[int], ranks: int) -> int:
    """The flat buffer of stages 1 and 2: every part begins at a multiple of two elements."""
    return padded(sum(sizes), 2 * ranks)


def consecutive(sizes: Iterable[int], limit: int) -> list[list[int]]:
    """Numbers of modules by group: a new group begins where the next module would exceed ``limit`` elements."""
    groups: list[list[int]] = []
    elements = 0
    for number, size in enumerate(sizes):
        if not groups or elements + size > limit:
            groups.append([])
            elements = 0
        groups[-1].append(number)
        elements += size
    return groups


def gradient_buckets(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Gradients by bucket: a new one where the next gradient would not fit."""
    bucket: list[int] = []
    for size in sizes:
        if bucket and sum(bucket) + size > limit:
            yield bucket
            bucket = []
        bucket.append(size)
    yield bucket


def summed_messages(
    sizes: Sequence[int], groups: Sequence[Sequence[int]], options: ZeroOptions, ranks: int
) -> list[int]:
    """Sums of one backward pass under stage 2, of gradients ``sizes`` in its order.

    A parameter larger than a bucket is summed owner by owner, as many owners at a time as exceed a bucket.
    """
    limit, messages = options.reduce_bucket_size, []
    large = [cuts for group in groups for cuts in _owners(group, ranks, limit)]
    for bucket in gradient_buckets(sizes, limit):
        elements = sum(bucket)
        if elements > limit:
            messages += large.pop()  # the backward pass meets them from the last to the first
        else:
            messages.append(elements)
    return messages


def _owners(group: Sequence[int], ranks: int, limit: int) -> Iterator[list[int]]:
    """For each parameter of a group that exceeds a bucket: the elements of its messages."""
    part, start = flat_elements(group, ranks) // ranks, 0
    for size in group:
        end = start + size
        if size > limit:
            messages, first = [], start
            for owner in range(start // part * part + part, end, part):
                if owner - first > limit:
                    messages.append(owner - first)
                    first = owner
            yield [*messages, end - first]
        start = end


def scattered_messages(sizes: Sequence[int], options: ZeroOptions, ranks: int) -> list[int]:
    """Reduce-scatters of one backward pass under stage 3: every parameter is cut and padded by itself."""
    buckets = gradient_buckets(sizes, options.reduce_bucket_size)
    return [sum(padded(size, ranks) for size in bucket) for bucket in buckets]


def gathered_messages(
    modules: Sequence[Sequence[int]], options: ZeroOptions, ranks: int, micro_batches: int
) -> list[int]:
    """Gathers of weights in one forward and backward pass under stage 3, once the modules' order is known.

    DeepSpeed gathers what a module lacks, then ahead until a bucket is full; a module's weights are given back after
    it unless the order has a use of them that was passed over, or one near by. Parameters up to
    ``stage3_param_persistence_threshold`` are not given back: they travel after the update (:func:`persistent`).

    What is given back is decided in the second micro-batch of the run and never again. If that is of the first step,
    the parameters that are not given back are still to be gathered in it.
    """
    trace = _Trace(modules, options, ranks)
    _, decisions = trace.run(trace.kept if micro_batches == 1 else frozenset(), None)
    messages, _ = trace.run(trace.kept, decisions)
    return messages


class _Trace:
    """The order of modules in a forward and a backward pass, and what DeepSpeed gathers along it."""

    def __init__(self, modules: Sequence[Sequence[int]], options: ZeroOptions, ranks: int) -> None:
        self.options, self.ranks = options, ranks
        self.sizes = [size for module in modules for size in module]
        numbers = iter(range(len(self.sizes)))
        # The model itself, which has no parameters of its own, is a module of the order.
        forward = [[], *([next(numbers) for _ in module] for module in modules)]
        self.order = [*forward, [], *reversed(forward[1:])]
        threshold = options.stage3_param_persistence_threshold
        self.kept = frozenset(number for number, size in enumerate(self.sizes) if size <= threshold)

    def run(self, here: frozenset[int], decisions: list[set[int]] | None) -> tuple[list[int], list[set[int]]]:
        """Messages of a pass that begins with the parameters ``here``, and what is given back after each module."""
        options, size_of, held = self.options, self.sizes, set(here)
        queue = deque((number, step) for step, module in enumerate(self.order) for number in module)
        seen, live, made = [-1] * len(size_of), 0, []
        messages: list[int] = []
        for step, module in enumerate(self.order):
            live += self._gather(module, held, messages)
            for _ in [number for number in module if seen[number] < step]:
                number, last = queue.popleft()
                seen[number] = last
            room = min(options.stage3_max_live_parameters - live, options.stage3_prefetch_bucket_size)
            ahead: dict[int, None] = {}
            while queue and sum(size_of[number] for number in ahead) < room:
                number, last = queue.popleft()
                seen[number] = max(seen[number], last)
                if number not in held:
                    ahead[number] = None
            live += self._gather(ahead, held, messages)
            if decisions is None:
                back = {number for number in module if number not in self.kept and seen[number] <= step + 1}
                back -= self._used_soon(step + 1)
            else:
                back = decisions[step]
            made.append(back)
            live -= sum(size_of[number] for number in back & held)
            held -= back
        return messages, made

    def _gather(self, wanted: Iterable[int], held: set[int], messages: list[int]) -> int:
        """Elements of those that are not held, which are from now on."""
        lacking = [number for number in wanted if number not in held]
        if lacking:
            messages.append(sum(padded(self.sizes[number], self.ranks) for number in lacking))
            held.update(lacking)
        return sum(self.sizes[number] for number in lacking)

    def _used_soon(self, step: int) -> set[int]:
        """Parameters within ``stage3_max_reuse_distance`` elements from ``step`` on."""
        found, passed = set(), 0
        for module in self.order[step:]:
            if passed >= self.options.stage3_max_reuse_distance:
                break
            found.update(module)
            passed += sum(self.sizes[number] for number in module)
        return found


def persistent(sizes: Iterable[int], options: ZeroOptions, ranks: int) -> list[int]:
    """The gather after an update under stage 3: of all parameters that are not given back."""
    kept = [size for size in sizes if size <= options.stage3_param_persistence_threshold]
    return [sum(padded(size, ranks) for size in kept)] if kept else []
