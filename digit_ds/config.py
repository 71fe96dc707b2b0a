"""The recipe: everything that defines a training run, typed, documented and checked before anything starts.

A recipe is a YAML file; ``section.key=value`` on the command line overrides one field. Unknown keys, values of the
wrong type and combinations that cannot work end in one line.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from digit_ds import shipped
from digit_ds.errors import UserError
from digit_ds.model.spec import Architecture
from digit_ds.settings import PathText, Section, ShortPrecision, brief
from digit_ds.yaml_files import parse_yaml, read_yaml


def _whole_layers(value: object) -> object:
    """What ``recompute`` was before parts of a layer could be chosen."""
    return {True: "layer", False: "none"}[value] if isinstance(value, bool) else value


class ModelConfig(Section, Architecture):
    """The transformer. Vocabulary sizes and the token grid come from the shards, not from here."""

    class_conditional: bool = False
    """Whether a class token takes BOS's place (prior and vq only)."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the embeddings and on both residual branches; attention and activations have none, as published."""


class DataConfig(Section):
    """Token shards."""

    shards: PathText
    """Directory of training shards, or an object-store URL (``s3://``, ``gs://``, ...)."""
    cache: PathText | None = None
    """Directory on the node's own disk for decompressed shards, local or remote ones, kept for the next run. Unset: a
    directory in the temporary folder."""
    validation: PathText | None = None
    """Directory or URL of validation shards; unset: no validation."""
    cache_limit: float | None = Field(None, gt=0)
    """GiB of decompressed shards that a node keeps; shards are then fetched again in each epoch, and images are
    shuffled between as many shards as half of it holds, which should be more than all ranks read ahead. Unset: all
    shards are kept."""
    order: Literal["auto", "keyed", "permutation"] = "auto"
    """How an epoch's order is made. ``keyed``: computed, a few numbers a shard; ``permutation``: stored, a number for
    each image, that of runs begun by version 0.2. ``auto``: what the run began with, ``keyed`` for a new one."""
    shuffle_seed: int = 0
    """Seed of the sample order; keep it when resuming."""
    workers: int = Field(1, ge=0)
    """Loader processes per rank."""

    @model_validator(mode="after")
    def _limit_needs_windows(self) -> "DataConfig":
        if self.cache_limit is not None and self.order == "permutation":
            raise ValueError("data.cache_limit is set and data.order is permutation, expected data.order keyed")
        return self


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW (decoupled weight decay, as fairseq's Adam)."""

    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.98), strict=False)
    """Adam's exponential decay rates."""
    epsilon: float = Field(1e-8, gt=0)
    """Adam's denominator term (fairseq's default)."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay, on all parameters as published."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""


class ScheduleConfig(Section):
    """Learning rate over steps."""

    name: Literal["inverse_sqrt", "cosine", "warmup_stable_decay", "constant"] = "inverse_sqrt"
    """Shape after the warm-up; published priors use ``inverse_sqrt``."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up; unset: a twentieth of the run, at most the published 6250. A run that is continued keeps
    its number."""
    warmup_start: float = Field(1e-7, ge=0)
    """Learning rate at step 0."""
    minimum: float = Field(0.0, ge=0)
    """Learning rate at the end (cosine, warmup_stable_decay)."""
    decay_steps: int = Field(0, ge=0)
    """Last steps in which warmup_stable_decay falls linearly to ``minimum``."""


def _check_micro_batch(found: Any) -> Any:
    if found != "auto" and (not isinstance(found, int) or isinstance(found, bool) or found < 1):
        raise ValueError("a whole number of at least 1, or auto")
    return found


MicroBatch = Annotated[int | Literal["auto"], BeforeValidator(_check_micro_batch)]


class TrainingConfig(Section):
    """Batches, length and precision."""

    steps: int = Field(..., ge=1)
    """Optimizer steps of the whole run."""
    global_batch: int = Field(1024, ge=1)
    """Images a step over all ranks."""
    micro_batch: MicroBatch = 64
    """Images of one forward pass on one data-parallel rank; keep it over layouts for equal dropout masks. ``auto``: the
    largest that divides a rank's share of the global batch and, by ``digit-ds estimate``, fits into its memory; a run
    that is continued keeps its number while that divides."""
    seed: int = 1
    """Seed of the initial weights and of dropout."""
    start_from: PathText | None = None
    """Model directory (released, or cut by ``to-megatron``) whose weights a new run starts from; unset: drawn."""
    precision: Annotated[Literal["fp32", "bf16"], ShortPrecision] = "bf16"
    """Compute precision; master weights, gradient accumulation and reduction are fp32 either way."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Smoothing spread over the whole output vocabulary (fairseq's convention as the golden data state it)."""
    class_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of images whose class token is replaced by BOS, for classifier-free guidance."""
    order: Literal["raster", "random"] = "raster"
    """Order in which a prior or VQ baseline writes the tokens of a training image: ``raster``, or ``random`` annealed
    to raster (RAR, arXiv 2411.00776). Samples are written in raster order either way."""
    order_anneal: tuple[int, int] | None = Field(None, strict=False)
    """With ``order: random`` the steps between which the share of randomly ordered images falls linearly from 1 to 0;
    RAR: half and three quarters of the run."""
    recompute: Annotated[Literal["none", "attention", "feed_forward", "layer"], BeforeValidator(_whole_layers)] = "none"
    """What of each layer is computed again in the backward pass instead of kept: slower, less memory. ``true`` means
    ``layer``, ``false`` means ``none``."""
    compile: bool = False
    """Compile the layers with torch.compile."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights; 0: none."""
    max_skipped: int = Field(10, ge=1)
    """The run stops after this many updates in a row that were skipped because their gradient was not finite."""
    timeout_seconds: float = Field(600.0, gt=0)
    """A collective that takes longer (a rank died or hangs) ends the job."""


class ParallelConfig(Section):
    """Layout over devices; the rest of the world is data-parallel."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size; must divide heads and ffn_width."""
    sequence: bool = False
    """Between the matrices a tensor-parallel rank holds its share of the tokens instead of all (sequence parallelism,
    arXiv 2205.05198): less memory, less work on every rank; ``tensor`` must divide ``training.micro_batch``."""


class CheckpointConfig(Section):
    """Training checkpoints; each is complete or not there."""

    every: int = Field(1000, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest stay."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this are never removed; 0: none."""


class MonitorConfig(Section):
    """What is written to metrics.jsonl and TensorBoard."""

    log_every: int = Field(10, ge=1)
    """Steps between logged lines."""
    validate_every: int = Field(0, ge=0)
    """Steps between validations; 0: none."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s for MFU; unset: known for common GPUs, otherwise MFU is null."""
    profile_step: int = Field(0, ge=0)
    """torch.profiler traces this step and the two after it into RUN/profile; 0: none."""


class PreviewConfig(Section):
    """Pictures of a model in training, drawn by a process of rank 0's own at each checkpoint while training goes on: a
    grid for TensorBoard, and an FID of few samples. A preview that fails is a warning; the run continues.
    """

    vqgan: PathText | None = None
    """VQGAN checkpoint that paints; unset: no pictures."""
    vqgan_config: PathText | None = None
    """Its taming-style YAML; unset: the .yaml of the checkpoint's name beside it, or MAGE's."""
    partner: PathText | None = None
    """Model directory of the other stage: a pixel decoder for a prior, a prior for a pixel decoder."""
    rows: int = Field(8, ge=1)
    """Rows of the grid; with a class-conditional prior the first classes, one a row."""
    columns: int = Field(8, ge=1)
    """Pictures of a row."""
    top_k: int | None = Field(None, ge=1)
    """First-stage codes are drawn from the k most probable; published: 200 (base), 400 (large); unset: from all."""
    decoder_top_p: float | None = Field(None, gt=0, le=1)
    """An ``ar`` decoder's codes are drawn from the most probable of this mass; published: 0.8; unset: from all."""
    fid_samples: int = Field(0, ge=0)
    """N: the FID of N pictures, classes in turn, is logged as ``online_fid_N``; 0: none. It compares checkpoints of
    a run and is no published figure (those are of 50,000). Must take less than ``training.timeout_seconds``."""
    fid_reference: PathText | None = None
    """Its reference: ``.npz`` of statistics (``mu``, ``sigma``) or of pictures (``arr_0``), or a folder, which is read
    at the first checkpoint."""
    fid_inception_weights: PathText | None = None
    """Local file of torch-fidelity's Inception weights; or"""
    fid_features: PathText | None = None
    """a feature network (safetensors) in their place."""


class Recipe(Section):
    """One training run."""

    run: PathText
    """Run directory: metrics.jsonl, tb/, checkpoints/."""
    deepspeed: PathText = "zero1.json"
    """DeepSpeed JSON, relative to the recipe's folder or the working directory, or the name of a shipped one."""
    model: ModelConfig = ModelConfig()
    """The transformer."""
    data: DataConfig
    """Token shards."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate."""
    training: TrainingConfig
    """Batches, length and precision."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over devices."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Training checkpoints."""
    monitor: MonitorConfig = MonitorConfig()
    """Logging."""
    preview: PreviewConfig = PreviewConfig()
    """Samples during training."""


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``section.key=value`` overrides (values in YAML syntax).

    ``path`` is a file or the name of a shipped recipe. Relative paths inside a recipe are relative to the working
    directory.

    Raises:
        UserError: the file cannot be read, a key is unknown, a value has the wrong type, or a combination cannot work.
    """
    path = shipped.find(path) or Path(path)
    values = read_yaml(path, f"expected a YAML recipe or one of {shipped.names('.yaml')}")
    for override in overrides or []:
        _apply(values, override)
    named = values.get("deepspeed")
    if isinstance(named, str) and os.path.isfile(path.parent / named):  # noqa: PTH113 (False for impossible names)
        values["deepspeed"] = str(path.parent / named)
    try:
        recipe = Recipe.read(values, str(path))
        _check_combinations(recipe, path)
    except UserError as error:
        raise UserError(_with_overrides(str(error), path, overrides or [])) from error
    return recipe


def _with_overrides(message: str, path: Path, overrides: list[str]) -> str:
    """The message of a refusal with those overrides behind the file's name whose keys it names."""
    text, about = message.removeprefix(f"{path}: "), []
    for override in overrides:
        key = override.partition("=")[0]
        before = r"(?<![\w.])" if "." in key else "^"  # ``run`` is a word of sentences too
        if re.search(rf"{before}{re.escape(key)}(?!\w)", text):
            about.append(brief(override)[1:-1])  # in one line, long ones shortened
    return f"{path} with {' '.join(about)}: {text}" if about else message


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in the nested mapping ``values``."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise UserError(f"{override!r}: expected an override of the form section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{name}: {section!r} is a value, expected a section of the recipe")
    values[key] = parse_yaml(text, f"{name} is {text!r}")


def _check_combinations(recipe: Recipe, path: Path) -> None:
    """Refuse what each field allows but the whole does not."""
    _check_preview(recipe.preview, path)
    model, training, tensor = recipe.model, recipe.training, recipe.parallel.tensor
    try:
        model.check_widths("model.")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name, size in (("model.heads", model.heads), ("model.ffn_width", model.feed_forward)):
        if size % tensor:
            raise UserError(f"{path}: {name} is {size}, expected a multiple of parallel.tensor {tensor}")
    if model.class_conditional and model.kind in ("ar", "nar"):
        raise UserError(f"{path}: model.class_conditional is true, expected false for a pixel decoder ({model.kind})")
    if training.class_dropout and not model.class_conditional:
        raise UserError(
            f"{path}: training.class_dropout is {training.class_dropout}, but model.class_conditional is false, "
            "expected 0"
        )
    _check_order(recipe, path)
    if training.micro_batch != "auto" and training.global_batch % training.micro_batch:
        raise UserError(
            f"{path}: training.global_batch is {training.global_batch}, expected a multiple of training.micro_batch "
            f"{training.micro_batch}"
        )


def _check_order(recipe: Recipe, path: Path) -> None:
    """A random order needs a kind that writes every token of an image, and the steps of its annealing."""
    kind, order, anneal = recipe.model.kind, recipe.training.order, recipe.training.order_anneal
    if order == "raster":
        if anneal is not None:
            raise UserError(
                f"{path}: training.order_anneal is {list(anneal)}, but training.order is raster, expected no "
                "order_anneal, or order random"
            )
        return
    if kind not in ("prior", "vq"):
        raise UserError(f"{path}: training.order is random, but model.kind is {kind}, expected prior or vq")
    if anneal is None or not 0 <= anneal[0] <= anneal[1]:
        found = None if anneal is None else list(anneal)
        raise UserError(
            f"{path}: training.order_anneal is {found}, expected two steps [first, last] for a random order"
        )


def _check_preview(preview: PreviewConfig, path: Path) -> None:
    """An FID needs pictures, a reference and one feature network."""
    if not preview.fid_samples:
        return
    if preview.fid_samples == 1:
        raise UserError(f"{path}: preview.fid_samples is 1, expected at least 2 (0: no FID)")
    for key in ("vqgan", "fid_reference"):
        if getattr(preview, key) is None:
            raise UserError(
                f"{path}: preview.fid_samples is {preview.fid_samples}, but preview.{key} is not set, expected a path"
            )
    if (preview.fid_inception_weights is None) == (preview.fid_features is None):
        raise UserError(
            f"{path}: preview.fid_samples is {preview.fid_samples}, expected either preview.fid_inception_weights or "
            "preview.fid_features"
        )
