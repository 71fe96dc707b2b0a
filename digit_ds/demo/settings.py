"""Settings of the demo."""

from digit_ds.settings import PathText, Section


class DemoSettings(Section):
    """Run the whole pipeline on handwritten digits and write pictures, scores and a report."""

    out: PathText = "demo_out"
    """Folder for all outputs."""
    small: bool = False
    """Run only a few steps of each stage, on smaller pictures, to check that all stages work."""
