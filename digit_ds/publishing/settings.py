"""Settings of fetching published weights and of publishing a model."""

from typing import Annotated, Literal

from digit_ds.settings import Option, PathText, Section

Size = Literal["base", "large"]


class FetchSettings(Section):
    """Fetch published weights: what a row of the paper's table needs is downloaded, checked and converted, and the
    command printed that draws pictures. Continues where it was interrupted; what is there is not fetched again.

    From DAMO-NLP-SG/DiGIT on the Hugging Face Hub come the prior, the pixel decoder and the codebook, from Meta's
    server DINOv2. HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are honoured.
    """

    size: Annotated[Size, Option(positional=True)]
    """Which models: base (219M parameters, 8,192 codes) or large (732M, 16,384 codes)."""
    dir: PathText = "weights"
    """Folder to write."""
    source: Annotated[PathText | None, Option(name="from", metavar="DIR")] = None
    """Take the files from this folder, where they were copied to (at any depth), and download nothing."""
    prior: Annotated[str | None, Option(metavar="FILE")] = None
    """The prior's checkpoint where it is another than the unconditional one: its path in the repository or folder."""
    decoder: Annotated[str | None, Option(metavar="FILE")] = None
    """Likewise the pixel decoder's."""


class PublishSettings(Section):
    """Upload a released model directory to the Hugging Face Hub, with a model card that states recipe, data, scores and
    licences. All files arrive in one commit. HF_ENDPOINT and HF_TOKEN are honoured.
    """

    model: Annotated[PathText, Option(positional=True, metavar="MODEL")]
    """Released model directory."""
    repository: Annotated[str, Option(positional=True, metavar="OWNER/NAME")]
    """Repository; made where it does not exist."""
    scores: Annotated[PathText | None, Option(metavar="JSON")] = None
    """What evaluate wrote for pictures of this model."""
    recipe: Annotated[PathText | None, Option(metavar="YAML")] = None
    """The run's recipe.yaml, to be printed in the card."""
    license: str = "mit"
    """Licence of the model, as the Hub names licences."""
    private: bool = False
    """Make a new repository private."""
