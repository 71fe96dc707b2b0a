"""Settings of the verbs that work on recipes and runs; the recipe itself is ``digit_ds.config``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from digit_ds.settings import Option, PathText, Section

_CONTINUING = "continuing a run in another way (recorded in RUN/history.jsonl)"

_PLANNED = "in place of token shards that are not made yet"


class RecipeSettings(Section):
    """A recipe and what differs from it."""

    recipe: Annotated[PathText, Option(positional=True)]
    """YAML recipe, or the name of a shipped one."""
    overrides: Annotated[list[str], Option(positional=True, metavar="section.key=value")] = Field([])
    """Fields of the recipe to change."""


class TrainSettings(RecipeSettings):
    """Train a model from token shards; resumes by itself."""

    change: Annotated[list[str], Option(metavar="section.key=value", group=_CONTINUING)] = Field([])
    """Fields of the recipe that are to differ from the run's earlier steps, such as optimizer.learning_rate."""
    rollback: Annotated[int | None, Option(metavar="STEP", group=_CONTINUING)] = Field(None, ge=0)
    """Go on from the checkpoint of this step; later ones are abandoned."""
    skip_batches: Annotated[int, Option(metavar="N", group=_CONTINUING)] = Field(0, ge=0)
    """Pass over so many global batches of the data order."""


class PlannedSettings(RecipeSettings):
    """A recipe over shards that need not be made yet."""

    images: Annotated[int | None, Option(metavar="N", group=_PLANNED)] = Field(None, ge=1)
    """Number of images."""
    grid: Annotated[int | None, Option(metavar="ROWS", group=_PLANNED)] = Field(None, ge=1)
    """Rows of the square token grid, such as 16."""
    codes: Annotated[int | None, Option(metavar="K", group=_PLANNED)] = Field(None, ge=1)
    """Codes of the codebook."""
    vq_codes: Annotated[int, Option(metavar="N", group=_PLANNED)] = Field(0, ge=0)
    """Codes of the VQGAN; 0: none."""
    classes: Annotated[int, Option(metavar="C", group=_PLANNED)] = Field(0, ge=0)
    """Number of classes; 0: none."""

    @model_validator(mode="after")
    def _all_three(self) -> "PlannedSettings":
        if self.images is not None and (self.grid is None or self.codes is None):
            raise ValueError("--images is given without --grid and --codes, expected all three in place of shards")
        return self


class EstimateSettings(PlannedSettings):
    """Parameters, memory and hours of a recipe, before anything is allocated."""

    gpus: Annotated[int, Option(metavar="N")] = 1
    """Devices of the run."""
    mfu: float = Field(0.4, gt=0, le=1)
    """Share of peak assumed for the hours."""
    memory: Annotated[float, Option(metavar="GIB")] = Field(80.0, gt=0)
    """Memory of a device, for ``training.micro_batch: auto``."""


class PlanSettings(PlannedSettings):
    """Layouts of a recipe that fit the GPUs, fastest first by prediction.

    Tensor and sequence parallelism, DeepSpeed file, micro-batch and recomputation are chosen; what training refuses is
    left out.
    """

    gpus: Annotated[int, Option(metavar="N")] = Field(..., ge=1)
    """GPUs of the run."""
    gpu: Literal["h100", "h200", "a100-80", "a100-40"] = "h100"
    """Kind of GPU."""
    per_host: Annotated[int, Option(metavar="N")] = Field(8, ge=1)
    """GPUs of a host; a tensor-parallel group does not leave it."""
    link: Annotated[float, Option(metavar="GB_S")] = Field(50.0, gt=0)
    """Speed between hosts for each GPU, 10^9 bytes a second and direction (50: one 400 Gbit/s port a GPU)."""
    show: Annotated[int, Option(metavar="N")] = Field(8, ge=1)
    """Layouts to print."""


class ExportSettings(Section):
    """Write the released model directory of a run."""

    run: Annotated[PathText, Option(positional=True)]
    """Run directory, or one checkpoint inside it."""
    out: Annotated[PathText, Option(positional=True)]
    """Model directory to write (config.json, model.safetensors)."""
    ema: bool = False
    """The moving average instead of the weights themselves."""
