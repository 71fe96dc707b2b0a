"""``digit-ds plan``: layouts of a recipe that fit the GPUs and that training accepts, fastest first by prediction."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from digit_ds.config import Recipe
from digit_ds.errors import UserError
from digit_ds.model import weights
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.deepspeed_config import read_deepspeed_config
from digit_ds.training.estimate import (
    SHARE,
    disk_line,
    host_memory,
    largest,
    memory_by_part,
    planned_shards,
    with_micro_batch,
    zero_of,
)
from digit_ds.training.flops import PEAKS, flops_per_image
from digit_ds.training.runs import model_spec
from digit_ds.training.settings import PlanSettings
from digit_ds.training.traffic import data_traffic, norm_traffic, tensor_traffic

FILES = ("zero1.json", "zero2_overlap.json", "zero3_overlap.json")
OFFLOADING = ("zero2_offload.json", "zero3_offload.json")
"""Optimizer in host memory: proposed where nothing fits without. How much slower it is was not measured."""
TIE = 0.005
"""Share of images/s within which layouts count as equally fast."""
RECOMPUTE = ("none", "attention", "feed_forward", "layer")
# Measured on H100, docs/training.md ("Speed and memory"); other GPUs are taken to reach the same shares of their peaks.
EFFICIENCY = ((1024, 0.43), (1536, 0.45), (3072, 0.50))
"""Width of the model, and the share of peak that its computation reaches on one GPU."""
REPLICATED = (0.08, 0.05)
"""Share of one GPU's computation that tensor-parallel ranks repeat, without and with sequence parallelism."""
IN_PIECES = 0.5
"""Share of the time of tensor-parallel collectives for which a GPU waits, where they travel in pieces."""
BESIDE = 0.2
"""Share of the time of hidden collectives by which the computation beside them slows down."""
HOST_SECONDS = 0.0015
"""What the host needs to issue a layer of a micro-batch: below that a GPU waits."""
ZERO3_SECONDS = 0.0010
"""What ZeRO 3 costs a layer of a micro-batch besides its collectives."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: memory in GiB, dense bf16 TFLOP/s, 10^9 bytes a second of its links within a host."""

    memory: float
    peak: float
    link: float


GPUS = {
    "h100": Gpu(79.2, PEAKS["H100"], 292.0),
    "h200": Gpu(139.8, PEAKS["H200"], 292.0),
    "a100-80": Gpu(79.2, PEAKS["A100"], 200.0),
    "a100-40": Gpu(39.4, PEAKS["A100"], 200.0),
}


@dataclass(frozen=True)
class Layout:
    """One way to train the recipe."""

    recipe: Recipe
    memory: float
    """GiB of one GPU, estimated."""
    host_memory: float
    """GiB of one host for what its ranks offload, computed."""
    images_per_second: float
    """Of all GPUs, predicted; where something is offloaded, what the same layout would reach if that took no time."""
    mfu: float

    @property
    def overrides(self) -> list[str]:
        """What makes the recipe train so."""
        training, parallel = self.recipe.training, self.recipe.parallel
        return [
            f"deepspeed={self.recipe.deepspeed}",
            f"parallel.tensor={parallel.tensor}",
            f"parallel.sequence={str(parallel.sequence).lower()}",
            f"training.micro_batch={training.micro_batch}",
            f"training.recompute={training.recompute}",
        ]


def plan(settings: PlanSettings, recipe: Recipe) -> None:
    """Print the best layouts and the overrides that choose the first.

    Args:
        settings: GPUs and links; the numbers of shards that are not made yet.
        recipe: what ``settings.recipe`` and ``settings.overrides`` name, read.

    Raises:
        UserError: the shards cannot be read, or no layout fits.
    """
    manifest = planned_shards(settings, recipe)
    spec = model_spec(recipe, manifest)
    found = layouts(settings, recipe, spec)
    images = recipe.training.steps * recipe.training.global_batch
    print(f"{spec.kind}, {weights.parameter_count(spec):,} parameters, {recipe.training.global_batch:,} images a step")
    print(f"{settings.gpus} x {settings.gpu}, {settings.per_host} a host, {settings.link:g} GB/s a GPU between hosts")
    offloads = found[0].host_memory > 0
    if offloads:
        print("no layout fits with the optimizer on the GPUs; with it in host memory:")
    print(
        "tensor sequence deepspeed           micro-batch recompute      GiB "
        + ("host GiB  images/s" if offloads else "images/s   MFU   hours")
    )
    for layout in found[: settings.show]:
        training, parallel = layout.recipe.training, layout.recipe.parallel
        speed = f"{layout.images_per_second:8,.0f} {layout.mfu:5.1%} {images / layout.images_per_second / 3600:7.1f}"
        print(
            f"{parallel.tensor:6} {'yes' if parallel.sequence else 'no':8} {layout.recipe.deepspeed:19} "
            f"{training.micro_batch:11} {training.recompute:12} {layout.memory:5.1f} "
            + (f"{layout.host_memory:8,.0f}  slower, not measured" if offloads else speed)
        )
    if offloads:
        print(
            "host GiB: page-locked buffers and optimizer states of all ranks of one host, computed; data is additional"
        )
    else:
        print("predicted; measured figures of one and two H100 are the base of the prediction (docs/training.md)")
    print(disk_line(found[0].recipe, spec))
    given = [word for word in settings.overrides if not word.startswith(("deepspeed=", "parallel."))]
    print("\n".join(_how_to_start(settings, [*given, *found[0].overrides])))


def _how_to_start(settings: PlanSettings, overrides: list[str]) -> list[str]:
    """The command for the GPUs of one host, and for several the ``overrides`` of a chain's section as well."""
    train = f"digit-ds train {settings.recipe}"
    if settings.gpus > settings.per_host:
        mapping = [
            "overrides:",
            *(f"  {key}: {value}" for key, _, value in (word.partition("=") for word in overrides)),
        ]
        hosts = -(-settings.gpus // settings.per_host)
        launcher = f"torchrun --nnodes {hosts} --nproc-per-node {settings.per_host} --rdzv-endpoint HOST:PORT"
        before = ["in the section of a Slurm chain (docs/cluster.md):", *mapping, "or on each host:"]
    else:
        launcher, before = f"torchrun --standalone --nproc-per-node {settings.gpus}", []
    if settings.gpus > 1:
        train = f"{launcher} -m {train.replace('digit-ds', 'digit_ds', 1)}"
    return [*before, f"{train} \\\n    " + " \\\n    ".join(overrides)]


def layouts(settings: PlanSettings, recipe: Recipe, spec: TransformerSpec) -> list[Layout]:
    """All that fit and that training accepts, each with its best micro-batch, fastest first.

    Layouts that keep the optimizer in host memory only where no other fits.

    Raises:
        UserError: there is none.
    """
    found = _fitting(settings, recipe, spec, FILES) or _fitting(settings, recipe, spec, OFFLOADING)
    if not found:
        raise UserError(
            f"no layout of {settings.recipe} fits {settings.gpus} x {settings.gpu} with {GPUS[settings.gpu].memory:g} "
            f"GiB and training.global_batch {recipe.training.global_batch}, also with the optimizer in host memory, "
            "expected more GPUs or another batch"
        )
    return _ranked(found)


def _ranked(found: Sequence[Layout]) -> list[Layout]:
    """Fastest first; of those within ``TIE`` of the fastest that is left, the one that recomputes least comes first,
    then the one of the smallest tensor size, then the one that takes least memory.
    """
    left, ranked = sorted(found, key=lambda layout: -layout.images_per_second), []
    while left:
        tied = [layout for layout in left if layout.images_per_second >= (1 - TIE) * left[0].images_per_second]
        ranked += sorted(tied, key=_simplicity)
        left = left[len(tied) :]
    return ranked


def _simplicity(layout: Layout) -> tuple[int, int, float, float]:
    training, parallel = layout.recipe.training, layout.recipe.parallel
    speed = round(layout.images_per_second, 1)
    return RECOMPUTE.index(training.recompute), parallel.tensor, -speed, layout.memory


def nearest(wanted: int, numbers: Sequence[int]) -> str:
    """``4 or 8``: the last of ascending ``numbers`` up to ``wanted`` and the first beyond; empty if there is none."""
    found = [*[number for number in numbers if number <= wanted][-1:], *[n for n in numbers if n > wanted][:1]]
    return " or ".join(map(str, found))


def _fitting(settings: PlanSettings, recipe: Recipe, spec: TransformerSpec, files: Sequence[str]) -> list[Layout]:
    """Those of these DeepSpeed files."""
    gpu, batch = GPUS[settings.gpu], recipe.training.global_batch
    if batch % settings.gpus:
        raise UserError(
            f"--gpus is {settings.gpus}, expected a number that divides training.global_batch {batch}, such as "
            f"{nearest(settings.gpus, [n for n in range(1, batch + 1) if batch % n == 0])}, or another batch"
        )
    found: dict[tuple, Layout] = {}
    for candidate in _candidates(settings, recipe, spec, files):
        data_size = settings.gpus // candidate.parallel.tensor
        parts = memory_by_part(candidate, spec, data_size, *zero_of(candidate))
        if sum(parts.values()) <= SHARE * gpu.memory:
            seconds = predicted_step(settings, candidate, spec).seconds
            speed = candidate.training.global_batch / seconds
            mfu = speed * flops_per_image(spec) / (settings.gpus * gpu.peak * 1e12)
            host = min(settings.gpus, settings.per_host) * host_memory(candidate, spec, data_size)
            kind = (
                candidate.deepspeed,
                candidate.parallel.tensor,
                candidate.parallel.sequence,
                candidate.training.recompute,
            )
            if kind not in found or speed >= found[kind].images_per_second:  # of equal ones the larger micro-batch
                found[kind] = Layout(candidate, sum(parts.values()), host, speed, mfu)
    return list(found.values())


def _candidates(
    settings: PlanSettings, recipe: Recipe, spec: TransformerSpec, files: Sequence[str]
) -> Iterator[Recipe]:
    """Every layout that training would not refuse, its micro-batch any number that divides a rank's images."""
    for tensor, file, recompute in itertools.product((1, 2, 4, 8), files, RECOMPUTE):
        if settings.gpus % tensor or settings.per_host % tensor or recipe.training.global_batch % settings.gpus:
            continue
        data_size = settings.gpus // tensor
        rank_images = recipe.training.global_batch // data_size
        for sequence, number in itertools.product((False, True), range(1, rank_images + 1)):
            if rank_images % number or (sequence and tensor == 1):
                continue
            parallel = recipe.parallel.model_copy(update={"tensor": tensor, "sequence": sequence})
            training = recipe.training.model_copy(update={"recompute": recompute})
            made = recipe.model_copy(update={"deepspeed": file, "parallel": parallel, "training": training})
            made = with_micro_batch(made, number)
            try:
                weights.check_tensor_size(spec, tensor)
                read_deepspeed_config(made, data_size)
            except UserError:
                continue
            yield made


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by what the device does."""

    computation: float
    repeated: float
    """What tensor-parallel ranks all compute."""
    tensor: float
    """Collectives between tensor-parallel ranks, which do not overlap with computation."""
    data: float
    """Exposed collectives between data-parallel ranks: not overlapped, or longer than the computation beside them."""
    beside: float
    """Slowdown of the computation that collectives overlap with."""
    own: float
    """What ZeRO 3 costs besides its collectives."""
    hidden: float
    """Overlapped collectives; no part of the step."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.computation + self.repeated + self.tensor + self.data + self.beside + self.own


def predicted_step(settings: PlanSettings, recipe: Recipe, spec: TransformerSpec) -> Step:
    """Time of a step: computation, exposed collectives, and the cost of overlapped ones and of ZeRO 3.

    Gradients of ``overlap_comm`` overlap with the backward pass, two thirds of the computation, and ZeRO 2's gathers by
    group with the forward pass, the other third; ZeRO 3's collectives with all of it; with sequence parallelism half of
    the tensor-parallel collectives. Other sums between tensor-parallel ranks and ZeRO 1's gradients do not overlap.
    """
    gpu, training, tensor = GPUS[settings.gpu], recipe.training, recipe.parallel.tensor
    assert training.micro_batch != "auto"
    data_size = settings.gpus // tensor
    micro_batches = training.global_batch // (data_size * training.micro_batch)
    work = training.global_batch / settings.gpus * flops_per_image(spec) * (1 + _again(recipe, spec))
    compute = max(work / (gpu.peak * 1e12 * _efficiency(spec.width)), HOST_SECONDS * spec.layers * micro_batches)
    between = sum(part.seconds(tensor, gpu.link) for part in tensor_traffic(recipe, spec)) * micro_batches
    between *= IN_PIECES if recipe.parallel.sequence and training.compile else 1.0
    between += sum(part.seconds(tensor, gpu.link) for part in norm_traffic(recipe))
    hosts = -(-settings.gpus // settings.per_host)
    link = gpu.link if hosts == 1 else min(gpu.link, settings.per_host // tensor * settings.link)
    alone, sums, gathers = 0.0, 0.0, 0.0
    for part in data_traffic(recipe, spec, data_size, micro_batches):
        seconds = part.seconds(data_size, link, hosts)
        if not part.beside:
            alone += seconds
        elif part.operation == "all_gather":
            gathers += seconds
        else:
            sums += seconds
    stage, beside = zero_of(recipe)[0], sums + gathers
    if stage == 3:
        exposed = max(0.0, beside - compute)
    else:
        exposed = max(0.0, sums - compute * 2 / 3) + max(0.0, gathers - compute / 3)
    return Step(
        computation=compute,
        repeated=REPLICATED[recipe.parallel.sequence] * compute * (tensor - 1),
        tensor=between,
        data=alone + exposed,
        beside=BESIDE * beside,
        own=ZERO3_SECONDS * spec.layers * micro_batches if stage == 3 else 0.0,
        hidden=beside - exposed,
    )


def predicted_hours(settings: PlanSettings, recipe: Recipe, spec: TransformerSpec) -> float:
    """Hours of the whole run in the recipe's own layout; ``micro_batch: auto`` is the largest that fits.

    Raises:
        UserError: not even one image fits.
    """
    if recipe.training.micro_batch == "auto":
        data_size = settings.gpus // recipe.parallel.tensor
        recipe = with_micro_batch(recipe, largest(recipe, spec, data_size, GPUS[settings.gpu].memory))
    return recipe.training.steps * predicted_step(settings, recipe, spec).seconds / 3600


def _efficiency(width: int) -> float:
    """Between the measured widths in proportion to the logarithm, beyond them as the nearest."""
    (first, low), *_, (last, high) = EFFICIENCY
    for (narrow, less), (wide, more) in itertools.pairwise(EFFICIENCY):
        if narrow <= width <= wide:
            return less + (more - less) * math.log(width / narrow) / math.log(wide / narrow)
    return low if width < first else high if width > last else less


def _again(recipe: Recipe, spec: TransformerSpec) -> float:
    """Work of recomputation as a share of the rest: a second forward pass, a third of it, of what is recomputed.

    A part's last matrix is left out: the backward pass does not need its product. That of a whole layer is, by the
    norm or the dropout behind it.
    """
    square, down = spec.width**2, spec.width * spec.feed_forward
    up = down * (1 if spec.activation == "gelu" else 2)
    attention = 3 * square + 2 * spec.width * spec.sequence_length
    whole = attention + square + up + down
    shares = {"none": 0, "attention": attention, "feed_forward": up, "layer": whole}
    if recipe.model.dropout == 0 and spec.norm_position == "pre":
        shares["layer"] -= down
    return shares[recipe.training.recompute] / whole / 3
