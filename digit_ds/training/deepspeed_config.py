"""The DeepSpeed JSON that a recipe names: passed on unchanged but for what the recipe owns, which must not disagree."""

from pathlib import Path
from typing import Any

from digit_ds import shipped
from digit_ds.config import Recipe
from digit_ds.errors import UserError
from digit_ds.files import read_json

_OPTIMIZER_KEYS = (
    "optimizer",
    "scheduler",
    "amp",
    "fp16",
    "torch_autocast",
    "tensor_parallel",
    "sequence_parallel_size",
)


def read_deepspeed_config(recipe: Recipe, data_size: int) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize`` with ``data_size`` data-parallel ranks.

    Raises:
        UserError: the file is missing, contradicts the recipe, or asks for a combination that is not correct.
    """
    path = find_config(recipe.deepspeed)
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, expected a mapping of DeepSpeed options")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    for key in _OPTIMIZER_KEYS:
        if key in config:
            raise UserError(f"{path}: holds {key!r}, expected it in the recipe alone; remove it")
    _check_combinations(recipe, path, config, zero, stage)
    for key, value in _owned(recipe, data_size, stage, path, config.get("communication_data_type")).items():
        config[key] = _agreed(path, key, config.get(key), value)
    return config


def find_config(name: str) -> Path:
    """The file: as given (relative to the recipe's folder or the working directory), else among the shipped ones."""
    if (path := shipped.find(name)) is None:
        raise UserError(f"deepspeed is {name!r}, expected a file or one of {shipped.names('.json')}")
    return path


def _owned(recipe: Recipe, data_size: int, stage: int, path: Path, sent: Any) -> dict[str, Any]:
    """What the recipe decides, under DeepSpeed's keys. ``sent`` is the file's type of gradients on their way."""
    training = recipe.training
    if training.micro_batch == "auto":
        if training.global_batch % data_size:
            raise UserError(
                f"training.global_batch is {training.global_batch}, expected a multiple of {data_size} data-parallel "
                "ranks"
            )
        micro_batch = training.global_batch // data_size  # the largest; what fits is known with the shards
    else:
        micro_batch = training.micro_batch
    per_pass = micro_batch * data_size
    if training.global_batch % per_pass:
        raise UserError(
            f"training.global_batch is {training.global_batch}, expected a multiple of training.micro_batch "
            f"{training.micro_batch} x {data_size} data-parallel ranks"
        )
    owned: dict[str, Any] = {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": training.global_batch // per_pass,
        # The optimizer clips by recipe.optimizer.gradient_clipping inside its fused kernel.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,  # GuardedAdamW is torch's AdamW, which ZeRO supports
        "steps_per_print": 10**9,
        # DeepSpeed's own measurement of speed makes the host wait for the GPU twice in each micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if training.precision == "bf16":
        # The optimizer skips what is not finite; DeepSpeed's own check would make the host wait once a step.
        owned["bf16"] = {"enabled": True, "check_grad_overflow": False, "immediate_grad_update": stage == 1}
    if stage:
        # Left out, both default to bf16.
        owned["data_types"] = {"grad_accum_dtype": "fp32"}
        rounded = sent == "bf16" and training.precision == "bf16" and stage > 1  # stage 1 sums what it accumulates
        owned["communication_data_type"] = "bf16" if rounded else "fp32"
    return owned


def _agreed(path: Path, key: str, found: Any, wanted: Any) -> Any:
    """The recipe's value of ``key``, where the file says the same or nothing."""
    if isinstance(wanted, dict):
        found = {} if found is None else found
        if not isinstance(found, dict):
            raise UserError(f"{path}: {key} is {found!r}, expected a mapping")
        return found | {name: _agreed(path, f"{key}.{name}", found.get(name), value) for name, value in wanted.items()}
    if key == "gradient_clipping":
        if found is not None:
            raise UserError(f"{path}: holds 'gradient_clipping', expected optimizer.gradient_clipping alone; remove it")
    elif found is not None and found != wanted and found != "auto":
        raise UserError(f"{path}: {key} is {found!r}, expected {wanted!r} as in the recipe; remove it from this file")
    return wanted


def _check_combinations(recipe: Recipe, path: Path, config: dict[str, Any], zero: dict[str, Any], stage: int) -> None:
    """Refuse what DeepSpeed 0.19 accepts and then computes wrongly, or fails at after minutes."""
    training = recipe.training
    if stage == 0 and training.precision == "bf16":
        raise UserError(
            f"{path}: zero_optimization.stage is 0, expected 1 or more with training.precision bf16: stage 0 cannot "
            "accumulate bf16 gradients in fp32"
        )
    if zero.get("overlap_comm") is None and stage == 3:
        zero["overlap_comm"] = False  # on by default in stage 3 alone, with repeated reports of NaN
    if recipe.parallel.sequence and training.micro_batch % recipe.parallel.tensor:
        raise UserError(
            f"training.micro_batch is {training.micro_batch}, expected a multiple of parallel.tensor "
            f"{recipe.parallel.tensor} with parallel.sequence"
        )
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") not in ("none", "cpu"):
        raise UserError(f"{path}: offload_optimizer.device is {offload['device']!r}, expected 'cpu' or 'none'")
    if offload.get("device") == "cpu":
        if stage == 1:
            raise UserError(f"{path}: zero_optimization.stage is 1, expected 2 or 3 with offload_optimizer")
        # The fused CPU AdamW of PyTorch stands in for DeepSpeed's, which is compiled at first use.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    for key in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(key) not in (None, False, 1):
            raise UserError(f"{path}: zero_optimization.{key} is on, expected it off, since it makes results inexact")
