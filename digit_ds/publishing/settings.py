"""Settings of fetching published weights and of publishing a model."""

from typing import Annotated, Literal

from digit_ds.settings import Option, PathText, Section

Size = Literal["base", "large"]


class FetchSettings(Section):
    """Download the published weights of one model size, check and convert them, and print the sample command that uses
    them.

    An interrupted download continues; files that exist are not downloaded again. The prior, the pixel decoder and the
    codebook come from DAMO-NLP-SG/DiGIT on the Hugging Face Hub, DINOv2 from Meta's server. The environment variables
    HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are used. ``trial`` downloads nothing: it writes small random networks
    under the names of base, to try commands; their pictures are noise of 128 pixels.
    """

    size: Annotated[Size | Literal["trial"], Option(positional=True)]
    """Model size: base (219M parameters, 8,192 codes), large (732M parameters, 16,384 codes) or trial."""
    dir: PathText = "weights"
    """Folder to write."""
    source: Annotated[PathText | None, Option(name="from", metavar="DIR")] = None
    """Folder that holds the downloaded files (at any depth); nothing is downloaded then."""
    prior: Annotated[str | None, Option(metavar="FILE")] = None
    """Path of the prior's checkpoint in the repository or folder; default: the unconditional one."""
    decoder: Annotated[str | None, Option(metavar="FILE")] = None
    """Path of the pixel decoder's checkpoint in the repository or folder; default: the autoregressive one."""


class PublishSettings(Section):
    """Upload a released model directory to the Hugging Face Hub, with a model card that states recipe, data, scores and
    licences. All files are uploaded in one commit. The environment variables HF_ENDPOINT and
    HF_TOKEN are used.
    """

    model: Annotated[PathText, Option(positional=True, metavar="MODEL")]
    """Released model directory."""
    repository: Annotated[str, Option(positional=True, metavar="OWNER/NAME")]
    """Repository on the Hub; created if it does not exist."""
    scores: Annotated[PathText | None, Option(metavar="JSON")] = None
    """JSON file that evaluate wrote for pictures of this model."""
    recipe: Annotated[PathText | None, Option(metavar="YAML")] = None
    """recipe.yaml of the run, to include in the model card."""
    license: str = "mit"
    """Licence of the model, by its identifier on the Hub."""
    private: bool = False
    """Create the repository as a private one."""
