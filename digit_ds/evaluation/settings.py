"""Settings of scores and probes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from digit_ds.settings import Option, PathText, Section

Preparation = Literal["none", "published", "adm"]
"""``none``: as they are. ``published``: short side to ``size`` by antialiased bicubic interpolation, centre crop.
``adm``: halved by box filters while at least twice as large, then bicubic, centre crop (the preparation of ADM's
reference batches)."""


class ReferenceSettings(Section):
    """What everything that scores against a reference shares: the reference, its preparation and the network."""

    reference: PathText
    """Pictures (folder, or .npz in ADM's layout), or .npz of statistics (mu, sigma)."""
    out: PathText
    """File to write."""
    inception_weights: PathText | None = None
    """Local file of torch-fidelity's Inception weights; or"""
    features: PathText | None = None
    """a feature network (safetensors) in place of Inception."""
    dinov2_weights: PathText | None = None
    """Local file of DINOv2's weights, ViT-L/14 in published figures: their class token gives FDD."""
    reference_name: str | None = None
    """What the reference is, for every output, such as ``ImageNet validation``; default: its path."""
    preparation: Preparation = "none"
    """How the reference's pictures are resized: not at all, as published, or as ADM's reference batches were."""
    size: int | None = Field(None, ge=1)
    """Side of the prepared reference pictures."""
    batch: int = Field(64, ge=1)
    """Pictures of one forward pass."""

    @model_validator(mode="after")
    def _one_network(self) -> "ReferenceSettings":
        if self.inception_weights is not None and self.features is not None:
            raise ValueError("inception_weights and features are both given, expected one of them")
        return self

    @property
    def fdd_alone(self) -> bool:
        """Whether DINOv2 is the only network that is named."""
        return self.dinov2_weights is not None and self.inception_weights is None and self.features is None


class EvaluateSettings(ReferenceSettings):
    """FID, FDD, Inception Score, precision and recall, class accuracy, written to a JSON file.

    FDD, the Fréchet distance between class tokens of DINOv2, is computed beside FID, or alone where DINOv2 is the only
    network that is named. Figures of fewer than 50,000 samples are labelled with their number: FID-10k.
    """

    generated: PathText
    """A sampling job's folder, a folder of pictures, or .npz in ADM's layout."""
    precision_recall: bool = False
    """Also precision and recall (memory grows with samples x reference)."""
    classifier: PathText | None = None
    """Feature network that judges whether samples show the class asked for."""
    labels: PathText | None = None
    """manifest.json of the sampling job (or .npz with arr_1), for the classifier."""
    cache: PathText | None = None
    """Folder for features and statistics, named by content."""

    @model_validator(mode="after")
    def _precision_has_a_network(self) -> "EvaluateSettings":
        if self.precision_recall and self.fdd_alone:
            raise ValueError("precision_recall is computed with Inception or a feature network, but neither is given")
        return self


class StatisticsSettings(ReferenceSettings):
    """Mean and covariance of a reference's features, computed once: what ``evaluate --reference`` and a recipe's
    ``preview.fid_reference`` take in place of the pictures. Precision and recall still need the pictures themselves.
    A file holds the features of one network.
    """

    @model_validator(mode="after")
    def _one_network_a_file(self) -> "StatisticsSettings":
        if self.dinov2_weights is not None and not self.fdd_alone:
            raise ValueError("statistics are of one network, but dinov2_weights and another one are given")
        return self


class ProbeSettings(Section):
    """Linear classifiers on the hidden states of every layer of a frozen prior."""

    NOT_RECORDED = frozenset({"model", "train", "val", "out"})
    FIRST_RECORDED = frozenset({"passes", "batch", "learning_rates", "seed"})

    model: PathText
    """Model directory of a prior or VQ baseline."""
    train: PathText
    """Labelled token shards; their views are the augmentation."""
    val: PathText
    """Labelled token shards to report accuracy on."""
    out: PathText
    """Folder for probe.json and probe.png."""
    passes: int = Field(30, ge=1)
    """Passes over all training samples."""
    batch: int = Field(256, ge=1)
    """Samples a step over all processes."""
    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Option(metavar="RATE")] = Field(
        [0.05, 0.1, 0.2, 0.4, 0.8], min_length=1
    )
    """Peak rates, trained side by side (published: 0.4)."""
    seed: int = 0
    """Seed of the order of samples."""
