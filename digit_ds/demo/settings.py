"""Settings of the demo."""

from digit_ds.settings import PathText, Section


class DemoSettings(Section):
    """The whole pipeline on handwritten digits: pictures, figures and a report."""

    out: PathText = "demo_out"
    """Folder for everything it makes."""
    small: bool = False
    """A few steps of everything, to see that it runs."""
