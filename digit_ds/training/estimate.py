"""What a recipe costs, before anything is allocated."""

import math
from pathlib import Path

from digit_ds.config import Recipe
from digit_ds.data.objects import is_address
from digit_ds.data.shards import ShardManifest, read_manifest
from digit_ds.errors import UserError
from digit_ds.files import read_json
from digit_ds.model import weights
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.deepspeed_config import find_config, read_deepspeed_config
from digit_ds.training.flops import PEAKS, flops_per_image
from digit_ds.training.runs import model_spec
from digit_ds.training.settings import EstimateSettings, PlannedSettings
from digit_ds.training.zero_messages import ZeroOptions

_GIB = 2**30
SHARE = 0.9
"""Share of a device's memory that the estimate may take: the rest is the allocator's, the libraries' and NCCL's."""


COMMON = ("H100", "H200", "A100")
"""GPUs whose peaks the output names."""


def device_parameters(spec: TransformerSpec, tensor_size: int) -> int:
    """Parameters of one tensor-parallel rank, vocabulary padding included."""
    return sum(math.prod(weights.shard_shape(parameter, tensor_size)) for parameter in weights.parameters(spec))


def memory_by_part(
    recipe: Recipe, spec: TransformerSpec, data_size: int, stage: int, offload: bool
) -> dict[str, float]:
    """GiB of one device by part; ``data_size`` data-parallel ranks share what the ZeRO stage partitions.

    Activations are those kept for the backward pass: a layer's input, both norms, q, k, v and the mixed values, both
    branches' outputs and dropout masks, the feed-forward before and after GELU (SwiGLU: gate, up and their product), q
    and k once more where they are normalised or turned. What is recomputed (attention, feed-forward, or all but the
    inputs of layers) counts for one layer. Parts between the parallel matrices count by tensor size, with
    ``parallel.sequence`` all others too.
    """
    count, tensor = device_parameters(spec, recipe.parallel.tensor), recipe.parallel.tensor
    low = 2 if recipe.training.precision == "bf16" else 4
    share = {at: data_size if stage >= at else 1 for at in (1, 2, 3)}
    parts = {"weights": count * low / share[3]}
    # Stage 1 in bf16 keeps a whole float32 buffer; stages 2 and 3 reduce into float32 parts bucket by bucket.
    parts["gradients"] = count * 4 / (share[2] if stage >= 2 else 1)
    states = 2 + (1 if recipe.training.ema_decay else 0) + (1 if stage else 0)  # moments, average, float32 master
    parts["optimizer"] = 0.0 if offload else count * 4 * states / share[1]
    images = recipe.training.micro_batch
    assert images != "auto"  # it is settled before
    rows, width = images * spec.sequence_length, spec.width
    tokens = rows / tensor if recipe.parallel.sequence else rows
    inputs, replicated = tokens * width * low, tokens * width * (6 * low + 2)
    attention = rows * (6 if spec.qk_norm or spec.positions == "rotary2d" else 4) * width * low / tensor
    feed_forward = rows * (2 if spec.activation == "gelu" else 3) * spec.feed_forward * low / tensor
    whole = replicated + attention + feed_forward
    again = {"none": 0.0, "attention": attention, "feed_forward": feed_forward, "layer": whole}
    recomputed = again[recipe.training.recompute]
    kept = inputs if recipe.training.recompute == "layer" else whole - recomputed
    parts["activations"] = spec.layers * kept + recomputed
    logits = images * (spec.tokens + 1) * weights.padded_rows(spec.vocabulary.output_size) / tensor
    parts["logits"] = logits * low
    return {name: size / _GIB for name, size in parts.items()}


def host_memory(recipe: Recipe, spec: TransformerSpec, data_size: int) -> float:
    """GiB of host memory that one rank's offloaded state takes; 0: nothing is offloaded.

    Of its part DeepSpeed keeps the float32 master weights, their gradients and the optimizer's states; under ZeRO 2 a
    copy of the weights in the compute precision and, in float32 with several micro-batches, the sum of earlier
    gradients; under ZeRO 3 a second buffer of the gradients and, with ``offload_param``, the weights. PyTorch allocates
    page-locked memory in powers of two. Data, caches and the rest of the process are not counted.
    """
    zero = read_json(find_config(recipe.deepspeed)).get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") != "cpu":
        return 0.0
    count, low = device_parameters(spec, recipe.parallel.tensor), 2 if recipe.training.precision == "bf16" else 4
    own = -(-count // data_size)
    states = 2 + (1 if recipe.training.ema_decay else 0)
    free, locked = 4 * own * states, [4 * own, 4 * own]
    if zero["stage"] == 3:
        free += 4 * own
        if (zero.get("offload_param") or {}).get("device") == "cpu":
            locked.append(low * own)
    else:
        locked += [low * own]
        assert recipe.training.micro_batch != "auto"
        if low == 4 and recipe.training.global_batch > recipe.training.micro_batch * data_size:
            locked.append(4 * own)
    if offload.get("pin_memory"):
        locked = [1 << (size - 1).bit_length() for size in locked]
    return (free + sum(locked)) / _GIB


def zero_of(recipe: Recipe) -> tuple[int, bool]:
    """ZeRO stage of the recipe's DeepSpeed file, and whether the optimizer's state lies in host memory."""
    options = ZeroOptions.read(read_json(find_config(recipe.deepspeed)))
    return options.stage, options.offloads


def largest(recipe: Recipe, spec: TransformerSpec, data_size: int, memory_gib: float) -> int:
    """The largest divisor of a rank's images a step whose estimated memory fits.

    Raises:
        UserError: not even one image fits.
    """
    rank_batch = recipe.training.global_batch // data_size
    stage, offload = zero_of(recipe)
    for number in range(rank_batch, 0, -1):
        if rank_batch % number:
            continue
        parts = memory_by_part(with_micro_batch(recipe, number), spec, data_size, stage, offload)
        if sum(parts.values()) <= SHARE * memory_gib:
            return number
    raise UserError(
        f"training.micro_batch is auto, but a single image needs about {sum(parts.values()):.1f} GiB and a device has "
        f"{memory_gib:.1f}, of which {SHARE:.0%} may be used; expected a higher ZeRO stage, more ranks or "
        "training.recompute"
    )


def disk_of(recipe: Recipe, spec: TransformerSpec) -> tuple[float, float]:
    """GiB of the checkpoints that a run keeps, and of its exported model.

    A checkpoint holds float32 weights, two moments and the moving average; one more is there while it is written.
    """
    kept, exported = recipe.checkpoint, weights.parameter_count(spec) * 4 / _GIB
    checkpoints = kept.keep_last + (recipe.training.steps // kept.keep_every if kept.keep_every else 0)
    return exported * (4 if recipe.training.ema_decay else 3) * checkpoints, exported


def disk_line(recipe: Recipe, spec: TransformerSpec) -> str:
    """``disk_of`` as ``estimate`` and ``plan`` print it."""
    checkpoints, exported = disk_of(recipe, spec)
    return f"disk             {checkpoints:.1f} GiB of checkpoints, {exported:.1f} GiB of the exported model"


def with_micro_batch(recipe: Recipe, number: int) -> Recipe:
    """The recipe with this number."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch": number})})


def planned_shards(settings: PlannedSettings, recipe: Recipe) -> ShardManifest:
    """Of the recipe's shards or, where the settings state their numbers, of shards that are not made yet."""
    if settings.images is None:
        shards = recipe.data.shards
        if not is_address(shards) and not Path(shards).exists():
            raise UserError(
                f"{shards}: does not exist, expected token shards or, where they do not exist yet, --images, --grid "
                "and --codes"
            )
        return read_manifest(shards)
    assert settings.grid is not None and settings.codes is not None  # its settings saw to it
    return shards_to_come(settings.images, settings.grid, settings.codes, settings.vq_codes, settings.classes)


def shards_to_come(images: int, side: int, codes: int, vq_codes: int, classes: int) -> ShardManifest:
    """The manifest of shards that are not made yet: ``side`` rows and columns of tokens, one view."""
    return ShardManifest(
        images=images,
        views=1,
        classes=[str(number) for number in range(classes)],
        grid=[side, side],
        image_size=16 * side,
        discriminative_codes=codes,
        vq_codes=vq_codes,
        crops="training",
        provenance={},
        index_sha256="",
        skipped=0,
    )


def estimate(settings: EstimateSettings, recipe: Recipe) -> None:
    """Print parameters, memory of one device by part and ZeRO stage, and the time of the run.

    Args:
        settings: devices, their memory and MFU; the numbers of shards that are not made yet.
        recipe: what ``settings.recipe`` and ``settings.overrides`` name, read.

    Raises:
        UserError: the shards cannot be read, or training would refuse the recipe on ``settings.gpus`` devices.
    """
    gpus, tensor = settings.gpus, recipe.parallel.tensor
    if gpus < 1 or gpus % tensor:
        raise UserError(f"--gpus is {gpus}, expected a multiple of parallel.tensor {tensor}")
    manifest = planned_shards(settings, recipe)
    spec, data_size = model_spec(recipe, manifest), gpus // tensor
    read_deepspeed_config(recipe, data_size)  # refuses what training refuses
    if recipe.training.micro_batch == "auto":
        recipe = with_micro_batch(recipe, largest(recipe, spec, data_size, settings.memory))
    stage, offload = zero_of(recipe)
    print(f"model            {spec.kind}, {weights.parameter_count(spec):,} parameters, {spec.sequence_length} tokens")
    print(f"one device       {device_parameters(spec, tensor):,} parameters of tensor size {tensor}")
    print(f"memory of one device (GiB), micro-batch {recipe.training.micro_batch}, {gpus} devices:")
    columns = [memory_by_part(recipe, spec, data_size, at, offload and at == stage) for at in range(4)]
    print("  " + "".ljust(14) + "".join(f"ZeRO {at}{'*' if at == stage else ' '}".rjust(10) for at in range(4)))
    for part in columns[0]:
        print(f"  {part:14}" + "".join(f"{column[part]:10.2f}" for column in columns))
    print(f"  {'total':14}" + "".join(f"{sum(column.values()):10.2f}" for column in columns))
    print("  (* this recipe" + (", optimizer in host memory)" if offload else ")"))
    images = recipe.training.steps * recipe.training.global_batch
    print(f"tokens a step    {recipe.training.global_batch * spec.sequence_length:,}")
    print(f"tokens an epoch  {manifest.images * spec.sequence_length:,} ({manifest.images:,} images)")
    print(f"run              {recipe.training.steps:,} steps, {images / manifest.images:.1f} epochs")
    if peak := recipe.monitor.peak_tflops:
        hours = images * flops_per_image(spec) / (gpus * peak * 1e12 * settings.mfu) / 3600
        print(f"time             {hours:.1f} hours at MFU {settings.mfu:.0%} of {peak:g} TFLOP/s a device")
    else:
        operations = images * flops_per_image(spec)
        kinds = ", ".join(f"{peak:g} ({name})" for name, peak in PEAKS.items() if name in COMMON)
        print(f"work             {operations:.3g} FLOP; for hours add monitor.peak_tflops=N, dense bf16: {kinds}")
    print(disk_line(recipe, spec))
