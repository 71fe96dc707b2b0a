"""Settings of the verbs that work on recipes and runs; the recipe itself is ``digit_ds.config``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from digit_ds.settings import Option, PathText, Section

_CONTINUING = "continuing a run in another way (recorded in RUN/history.jsonl)"

_PLANNED = "instead of token shards that do not exist yet"


class RecipeSettings(Section):
    """A recipe and what differs from it."""

    recipe: Annotated[PathText, Option(positional=True)]
    """Recipe: a YAML file, or the name of a shipped one, such as base_prior.yaml."""
    overrides: Annotated[list[str], Option(positional=True, metavar="section.key=value")] = Field([])
    """Fields of the recipe to change."""


class TrainSettings(RecipeSettings):
    """Train a model on token shards; continues from the newest checkpoint automatically."""

    change: Annotated[list[str], Option(metavar="section.key=value", group=_CONTINUING)] = Field([])
    """Fields of the recipe that differ from now on from the run's earlier steps, such as optimizer.learning_rate."""
    rollback: Annotated[int | None, Option(metavar="STEP", group=_CONTINUING)] = Field(None, ge=0)
    """Continue from the checkpoint of this step; later ones are removed at the next save."""
    skip_batches: Annotated[int, Option(metavar="N", group=_CONTINUING)] = Field(0, ge=0)
    """Number of global batches of the data order to skip."""


class PlannedSettings(RecipeSettings):
    """A recipe over shards that need not be made yet."""

    images: Annotated[int | None, Option(metavar="N", group=_PLANNED)] = Field(None, ge=1)
    """Number of images; requires ``--grid`` and ``--codes``."""
    grid: Annotated[int | None, Option(metavar="ROWS", group=_PLANNED)] = Field(None, ge=1)
    """Rows of the square token grid, such as 16."""
    codes: Annotated[int | None, Option(metavar="K", group=_PLANNED)] = Field(None, ge=1)
    """Number of codes of the codebook, such as 8192."""
    vq_codes: Annotated[int, Option(metavar="N", group=_PLANNED)] = Field(0, ge=0)
    """Number of codes of the VQGAN, such as 1024; 0: no VQ tokens."""
    classes: Annotated[int, Option(metavar="C", group=_PLANNED)] = Field(0, ge=0)
    """Number of classes; 0: no labels."""

    @model_validator(mode="after")
    def _all_three(self) -> "PlannedSettings":
        if self.images is not None and (self.grid is None or self.codes is None):
            raise ValueError("--images is given without --grid and --codes, expected all three in place of shards")
        return self


class EstimateSettings(PlannedSettings):
    """Print parameters, memory and training time of a recipe, before anything is allocated."""

    gpus: Annotated[int, Option(metavar="N")] = Field(1, ge=1)
    """Number of GPUs of the run."""
    mfu: float = Field(0.4, gt=0, le=1)
    """Model FLOPs utilisation, as a share of the GPU's peak, assumed for the training time."""
    memory: Annotated[float, Option(metavar="GIB")] = Field(80.0, gt=0)
    """Memory of a GPU in GiB, for ``training.micro_batch: auto``."""


class PlanSettings(PlannedSettings):
    """List the layouts of a recipe that fit the GPUs, by predicted speed, fastest first.

    Tensor and sequence parallelism, DeepSpeed file, micro-batch and recomputation are chosen; what training refuses is
    left out.
    """

    gpus: Annotated[int, Option(metavar="N")] = Field(..., ge=1)
    """Number of GPUs of the run."""
    gpu: Literal["h100", "h200", "a100-80", "a100-40"] = "h100"
    """Kind of GPU."""
    per_host: Annotated[int, Option(metavar="N")] = Field(8, ge=1)
    """GPUs per host; a tensor-parallel group stays within a host."""
    link: Annotated[float, Option(metavar="GB_S")] = Field(50.0, gt=0)
    """Bandwidth between hosts per GPU and direction in GB/s; 50 is one 400 Gbit/s port per GPU."""
    show: Annotated[int, Option(metavar="N")] = Field(8, ge=1)
    """Number of layouts to print."""


class ExportSettings(Section):
    """Export a training run as a released model directory."""

    run: Annotated[PathText, Option(positional=True)]
    """Run directory, for its newest checkpoint, or one checkpoint inside it."""
    out: Annotated[PathText, Option(positional=True)]
    """Model directory to write (config.json, model.safetensors)."""
    ema: bool = False
    """Export the moving average of the weights (training.ema_decay) instead of the weights."""
