"""Settings of the verbs that work on recipes and runs; the recipe itself is ``digit_ds.config``."""

from typing import Annotated

from pydantic import Field

from digit_ds.settings import Option, PathText, Section


class TrainSettings(Section):
    """Train a model from token shards; resumes by itself."""

    recipe: Annotated[PathText, Option(positional=True)]
    """YAML recipe, or the name of a shipped one."""
    overrides: Annotated[list[str], Option(positional=True, metavar="section.key=value")] = Field([])
    """Fields of the recipe to change."""


class EstimateSettings(TrainSettings):
    """Parameters, memory and hours of a recipe, before anything is allocated."""

    gpus: Annotated[int, Option(metavar="N")] = 1
    """Devices of the run."""
    mfu: float = Field(0.4, gt=0, le=1)
    """Share of peak assumed for the hours."""


class ExportSettings(Section):
    """Write the released model directory of a run."""

    run: Annotated[PathText, Option(positional=True)]
    """Run directory, or one checkpoint inside it."""
    out: Annotated[PathText, Option(positional=True)]
    """Model directory to write (config.json, model.safetensors)."""
    ema: bool = False
    """The moving average instead of the weights themselves."""
