"""What a recipe costs, before anything is allocated."""

import math

from digit_ds.config import Recipe
from digit_ds.data.shards import read_manifest
from digit_ds.errors import UserError
from digit_ds.files import read_json
from digit_ds.model import weights
from digit_ds.model.spec import TransformerSpec
from digit_ds.training.deepspeed_config import find_config
from digit_ds.training.metrics import flops_per_image
from digit_ds.training.runs import model_spec

_GIB = 2**30


def device_parameters(spec: TransformerSpec, tensor_size: int) -> int:
    """Parameters of one tensor-parallel rank, vocabulary padding included."""
    return sum(math.prod(weights.shard_shape(parameter, tensor_size)) for parameter in weights.parameters(spec))


def memory_by_part(
    recipe: Recipe, spec: TransformerSpec, data_size: int, stage: int, offload: bool
) -> dict[str, float]:
    """GiB of one device by part; ``data_size`` data-parallel ranks share what the ZeRO stage partitions.

    Activations are those kept for the backward pass: a layer's input, both norms, q, k, v and the mixed values, both
    branches' outputs and dropout masks, the feed-forward before and after GELU (SwiGLU: gate, up and their product), q
    and k once more where they are normalised or turned; with recomputation inputs alone and one layer's worth of the
    rest. Replicated parts count whole, those between the parallel matrices by tensor size.
    """
    count, tensor = device_parameters(spec, recipe.parallel.tensor), recipe.parallel.tensor
    low = 2 if recipe.training.precision == "bf16" else 4
    share = {at: data_size if stage >= at else 1 for at in (1, 2, 3)}
    parts = {"weights": count * low / share[3]}
    # Stage 1 in bf16 keeps a whole float32 buffer; stages 2 and 3 reduce into float32 parts bucket by bucket.
    parts["gradients"] = count * 4 / (share[2] if stage >= 2 else 1)
    states = 2 + (1 if recipe.training.ema_decay else 0) + (1 if stage else 0)  # moments, average, float32 master
    parts["optimizer"] = 0.0 if offload else count * 4 * states / share[1]
    rows, width = recipe.training.micro_batch * spec.sequence_length, spec.width
    replicated = rows * width * (6 * low + 2)
    heads = (6 if spec.qk_norm or spec.positions == "rotary2d" else 4) * width
    split = rows * (heads + (2 if spec.activation == "gelu" else 3) * spec.ffn_width) * low / tensor
    if recipe.training.recompute:
        parts["activations"] = spec.layers * rows * width * low + replicated + split
    else:
        parts["activations"] = spec.layers * (replicated + split)
    logits = recipe.training.micro_batch * (spec.tokens + 1) * weights.padded_rows(spec.vocabulary.output_size) / tensor
    parts["logits"] = logits * low
    return {name: size / _GIB for name, size in parts.items()}


def estimate(recipe: Recipe, gpus: int = 1, mfu: float = 0.4) -> None:
    """Print parameters, memory of one device by part and ZeRO stage, and the time of the run.

    The token grid and the code counts come from the shards' manifest.

    Raises:
        UserError: the shards cannot be read, or ``gpus`` devices cannot be laid out as the recipe says.
    """
    tensor = recipe.parallel.tensor
    if gpus < 1 or gpus % tensor:
        raise UserError(f"--gpus is {gpus}, expected a multiple of parallel.tensor {tensor}")
    manifest = read_manifest(recipe.data.shards, recipe.data.cache)
    spec, data_size = model_spec(recipe, manifest), gpus // tensor
    config = read_json(find_config(recipe.deepspeed))
    zero = config.get("zero_optimization", {})
    stage, offload = zero.get("stage", 0), (zero.get("offload_optimizer") or {}).get("device") == "cpu"
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
        hours = images * flops_per_image(spec) / (gpus * peak * 1e12 * mfu) / 3600
        print(f"time             {hours:.1f} hours at MFU {mfu:.0%} of {peak:g} TFLOP/s a device")
    else:
        operations = images * flops_per_image(spec)
        print(f"work             {operations:.3g} FLOP; set monitor.peak_tflops for hours")
