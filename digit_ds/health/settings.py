"""Settings of the check of machines."""

from pydantic import Field

from digit_ds.settings import PathText, Section


class DoctorSettings(Section):
    """Check this machine, or under srun or torchrun this cluster, before a long run."""

    folder: PathText = "."
    """Folder where runs will be written; must be readable and writable on all ranks."""
    shards: PathText | None = None
    """Token shards of which a sample is checked."""
    timeout: float = Field(60, gt=0, le=86400 * 30)
    """Seconds to wait for a rank before it counts as lost."""
