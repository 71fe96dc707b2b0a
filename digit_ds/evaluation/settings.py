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
    """File to write: JSON."""
    inception_weights: PathText | None = None
    """Local file of torch-fidelity's Inception weights; required for FID unless ``--features`` is given."""
    features: PathText | None = None
    """Feature network (.safetensors) instead of Inception."""
    dinov2_weights: PathText | None = None
    """Local file of DINOv2's weights, for FDD on the class token; published scores use ViT-L/14."""
    reference_name: str | None = None
    """Name of the reference in all outputs, such as ``ImageNet validation``; default: its path."""
    preparation: Preparation = "none"
    """How the reference's pictures are resized: not at all, as published, or as in ADM's reference batches."""
    size: int | None = Field(None, ge=1)
    """Side of the resized reference pictures in pixels; required with published and adm."""
    batch: int = Field(64, ge=1)
    """Pictures per forward pass."""

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
    """Compute FID, FDD, Inception Score, precision and recall, or class accuracy, and write them to a JSON file.

    FDD, the Fréchet distance between class tokens of DINOv2, is computed in addition to FID, or alone if DINOv2 is the
    only network given. Scores of fewer than 50,000 samples are labelled with their number, such as FID-10k.
    """

    generated: PathText
    """Pictures to score: a folder written by sample, a folder of pictures, or .npz in ADM's layout."""
    precision_recall: bool = False
    """Also compute precision and recall (memory: number of samples x size of the reference)."""
    classifier: PathText | None = None
    """Feature network (.safetensors) that classifies the samples, for the accuracy of the requested classes."""
    labels: PathText | None = None
    """Requested classes, for the classifier: manifest.json of the sampling job, or .npz with arr_1."""
    cache: PathText | None = None
    """Folder in which features and statistics are kept for later runs, under names made from their content."""

    @model_validator(mode="after")
    def _precision_has_a_network(self) -> "EvaluateSettings":
        if self.precision_recall and self.fdd_alone:
            raise ValueError("precision_recall is given alone, expected inception_weights or features with it")
        return self


class StatisticsSettings(ReferenceSettings):
    """Compute the mean and covariance of a reference's features and write them to an .npz file.

    ``evaluate --reference`` and a recipe's ``preview.fid_reference`` accept the file instead of the pictures. A file
    holds the statistics of one network. Precision and recall require the pictures.
    """

    out: PathText
    """File to write: .npz."""

    @model_validator(mode="after")
    def _one_network_a_file(self) -> "StatisticsSettings":
        if self.dinov2_weights is not None and not self.fdd_alone:
            raise ValueError("dinov2_weights and another network are given, expected one network for statistics")
        return self


class ProbeSettings(Section):
    """Train linear classifiers on the hidden states of every layer of a frozen prior."""

    NOT_RECORDED = frozenset({"model", "train", "val", "out"})
    FIRST_RECORDED = frozenset({"passes", "batch", "learning_rates", "seed"})

    model: PathText
    """Model directory of a prior or VQ baseline."""
    train: PathText
    """Labelled token shards to train on; their views are the data augmentation."""
    val: PathText
    """Labelled token shards to report accuracy on."""
    out: PathText
    """Folder to write: probe.json, probe.png."""
    passes: int = Field(30, ge=1)
    """Number of passes over all training samples."""
    batch: int = Field(256, ge=1)
    """Samples per step, over all processes."""
    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Option(metavar="RATE")] = Field(
        [0.05, 0.1, 0.2, 0.4, 0.8], min_length=1
    )
    """Peak learning rates; each trains a classifier of its own (published: 0.4)."""
    seed: int = 0
    """Seed of the order of samples."""
