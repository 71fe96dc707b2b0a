"""Settings of the check of machines."""

from pydantic import Field

from digit_ds.settings import PathText, Section


class DoctorSettings(Section):
    """Check this machine, or under srun or torchrun this cluster, before a long run."""

    folder: PathText = "."
    """Where runs will be written; all ranks must see it."""
    shards: PathText | None = None
    """Token shards to check a sample of."""
    timeout: float = Field(60, gt=0, le=86400 * 30)
    """Seconds after which a rank counts as lost."""
