"""Settings of the submission of a chain."""

from typing import Annotated

from pydantic import Field, model_validator

from digit_ds.settings import Option, PathText, Section


class SubmitSettings(Section):
    """Submit a whole chain, from images to scores, as Slurm jobs that wait for each other, or report their status."""

    chain: Annotated[PathText, Option(positional=True)]
    """Recipe of the chain, such as slurm/imagenet_base.yaml."""
    site: PathText | None = None
    """Your cluster; default: slurm/site.yaml of the checkout, or of the working directory where there is none."""
    dry_run: bool = False
    """Print what each step costs and the sbatch commands, and submit nothing."""
    images: Annotated[int, Option(metavar="N")] = Field(1_281_167, ge=1)
    """Training images that the costs of ``--dry-run`` are for; default: ImageNet's."""
    status: bool = False
    """Print the status of each step, and why one failed."""
    doctor: bool = False
    """Check the cluster with a short job and print what it reports."""

    @model_validator(mode="after")
    def _one_action(self) -> "SubmitSettings":
        if self.dry_run + self.status + self.doctor > 1:
            raise ValueError("--dry-run, --status and --doctor exclude each other, expected one of them")
        return self
