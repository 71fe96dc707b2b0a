"""Settings of the search for guidance."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from digit_ds.generation.settings import LARGEST, SMALLEST, SampleSettings, Schedule
from digit_ds.settings import Option, PathText

_SEARCH = Option(group="combinations and their scores")


class GuidanceSettings(SampleSettings):
    """Compute FID at every combination of guidance scale and exponent; continues an interrupted search.

    Accepts the options of ``sample``. All combinations are sampled with the same seeds. Use another reference for the
    final scores: scores against the reference that the scale was chosen on are biased.
    """

    out: PathText
    """Folder to write: guidance.json, and for each combination a sampling job in samples/ and its scores in scores/."""
    guidance_schedule: Annotated[Schedule, Option(group=_SEARCH.group)] = "power-cosine"
    """Guidance schedule of all combinations."""
    guidance: Annotated[float, Option(hidden=True)] = 1.0
    """Refused: ``scales`` are searched."""
    guidance_exponent: Annotated[float, Option(hidden=True)] = 1.0
    """Refused: ``exponents`` are searched."""
    scales: Annotated[list[Annotated[float, Field(ge=0, le=LARGEST)]], _SEARCH] = Field(min_length=1)
    """Guidance scales to try; 1 is no guidance and is sampled once."""
    exponents: Annotated[list[Annotated[float, Field(ge=SMALLEST, le=LARGEST)]], _SEARCH] = Field([1.0], min_length=1)
    """Exponents of ``power-cosine`` to try with each scale."""
    reference: Annotated[PathText, _SEARCH]
    """Pictures of the samples' size (folder, or .npz in ADM's layout), or .npz of statistics (mu, sigma)."""
    inception_weights: Annotated[PathText | None, _SEARCH] = None
    """Local file of torch-fidelity's Inception weights; required unless ``--features`` is given."""
    features: Annotated[PathText | None, _SEARCH] = None
    """Feature network (.safetensors) instead of Inception."""
    reference_name: Annotated[str | None, _SEARCH] = None
    """Name of the reference in all outputs, such as ``ImageNet training``; default: its path."""

    @model_validator(mode="after")
    def _check_search(self) -> "GuidanceSettings":
        if self.guidance != 1 or self.guidance_exponent != 1:
            raise ValueError(
                "guidance and guidance_exponent are searched, expected scales and exponents in their place"
            )
        if self.exponents != [1.0] and self.guidance_schedule != "power-cosine":
            raise ValueError(
                f"exponents are given, but guidance_schedule is {self.guidance_schedule}, expected power-cosine"
            )
        if self.count is None and self.per_class is None:
            raise ValueError("count and per_class are not given, expected one of them")
        if self.inception_weights is not None and self.features is not None:
            raise ValueError("inception_weights and features are both given, expected one of them")
        return self

    def jobs(self) -> dict[str, SampleSettings]:
        """One sampling job for each combination, by the name of its folder; without guidance one for all exponents."""
        common = self.model_dump(include=set(SampleSettings.model_fields))
        found = {}
        for scale in self.scales:
            for exponent in self.exponents:
                chosen: dict[str, str | float]
                if scale == 1:
                    name, chosen = "unguided", {"guidance_schedule": "constant"}
                else:
                    name = f"{self.guidance_schedule}-scale-{scale}-exponent-{exponent}"
                    chosen = {"guidance": scale, "guidance_exponent": exponent}
                place = {"out": str(Path(self.out) / "samples" / name)}
                found[name] = SampleSettings.read(common | chosen | place)
        return found
