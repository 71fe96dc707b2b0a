"""Settings of the submission of a chain."""

from typing import Annotated

from pydantic import Field, model_validator

from digit_ds.settings import Option, PathText, Section


class SubmitSettings(Section):
    """Submit a whole chain, from images to scores, as Slurm jobs that wait for each other, or report their status."""

    chain: Annotated[PathText, Option(positional=True)]
    """Chain file (YAML), such as slurm/imagenet_base.yaml."""
    site: PathText | None = None
    """Site file of the cluster (YAML); default: slurm/site.yaml of the checkout or, without one, of the working
    directory."""
    dry_run: bool = False
    """Print the cost of each step and the sbatch commands; submit nothing."""
    images: Annotated[int, Option(metavar="N")] = Field(1_281_167, ge=1)
    """Number of training images for the costs of ``--dry-run``; that of ImageNet unless given."""
    status: bool = False
    """Print the status of each step, and the error of a failed one."""
    doctor: bool = False
    """Run digit-ds doctor as a short job on the cluster and print its report."""

    @model_validator(mode="after")
    def _one_action(self) -> "SubmitSettings":
        if self.dry_run + self.status + self.doctor > 1:
            raise ValueError("--dry-run, --status and --doctor exclude each other, expected one of them")
        return self
