"""Settings of the jobs over image folders, and of the check of what they wrote."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from digit_ds.data.images import CropKind
from digit_ds.preparation.census import ClassOrder
from digit_ds.settings import Option, PathText, Section, ShortPrecision

JpegDecoder = Literal["cpu", "gpu"]
"""``cpu``: Pillow in the workers, the same pixels on every machine; ``gpu``: JPEG files are decoded and cut on the GPU,
whose pixel values differ by a level or two here and there."""
Precision = Annotated[Literal["fp32", "fp16", "bf16"], ShortPrecision]


class SplitSettings(Section):
    """Two folders of links, OUT/train and OUT/val, from a folder of images; a share of each class is held out."""

    NOT_RECORDED = frozenset({"images", "out"})
    FIRST_RECORDED = frozenset({"share", "seed"})

    images: Annotated[PathText, Option(metavar="DIR")]
    """Folder of images, or of a folder for each class; nothing in it is moved or copied."""
    out: PathText
    """New folder."""
    share: float = Field(0.1, gt=0, lt=1)
    """Share of each class that is held out; at least one image of it."""
    seed: int = 0
    """Seed of the choice, which depends on it and on the images' names alone."""


class JobSettings(Section):
    """Options that the jobs over an image folder share. Encoder, codebook and VQGAN are recorded in the provenance."""

    NOT_RECORDED = frozenset(
        {
            *("images", "labels", "encoder", "codebook", "vqgan", "vqgan_config", "out"),
            *("layer", "num_heads", "image_size", "workers", "block_images", "max_skipped"),
        }
    )
    FIRST_RECORDED = frozenset(
        {
            *("points", "fraction", "dtype", "views", "crops", "resize"),
            *("flips", "seed", "batch", "precision", "compile", "decoder"),
        }
    )

    images: Annotated[PathText, Option(metavar="PATH")]
    """Images: a folder, parquet, tars or a zip (docs/preparation.md lists the kinds); folders are the classes."""
    labels: Annotated[PathText | None, Option(metavar="FILE")] = None
    """Classes of images without class folders: Kaggle's LOC_val_solution.csv or ImageNet's devkit."""
    encoder: Annotated[PathText, Option(metavar="WEIGHTS")]
    """Weights of DINOv2, DINOv3, SigLIP, MAE, MoCo v3 or iBOT (docs/preparation.md lists the files)."""
    layer: int = 3
    """Which block from the end gives the features."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads where they are not those of the published models, most of which have width // 64."""
    out: PathText
    """New directory, or one in which this very job was begun."""
    flips: Annotated[bool, Option(name="flip")] = True
    """Whether random views may be mirrored; not for pictures that mean something else then, such as digits."""
    seed: int = 0
    """Seed of crops, flips and kept patches; what is drawn depends on it and on the image's name alone."""
    batch: int = Field(256, ge=1)
    """Views at a time."""
    precision: Precision = "fp32"
    """Arithmetic of the networks."""
    compile: bool = False
    """Fuse the networks with torch.compile: faster after a minute's work, other rounding."""
    decoder: JpegDecoder = "cpu"
    """Where JPEG files are decoded; a GPU's pixels differ by a level or two here and there."""
    workers: int | None = Field(None, ge=0)
    """Decoding processes per rank; default: all cores, shared among the machine's ranks."""
    block_images: int = Field(1024, ge=1)
    """Images per chunk or block of shards, the unit of restarting."""
    max_skipped: float = Field(0.25, ge=0, le=1)
    """Largest share of images that may be unreadable."""


class FeatureSettings(JobSettings):
    """The encoder's features of one random crop of every image, for K-Means."""

    image_size: int | None = Field(None, ge=1)
    """Side of the crop, to which the short side is scaled first; default: the encoder's own (224 of DINOv2)."""
    points: int | None = None
    """Patches kept of each image, drawn at random; default: all."""
    fraction: float | None = None
    """Share of patches kept, drawn patch by patch."""
    dtype: Precision = "fp16"
    """Stored type."""

    @model_validator(mode="after")
    def _one_of(self) -> "FeatureSettings":
        if self.points is not None and self.fraction is not None:
            raise ValueError("points and fraction are both given, expected one of them")
        return self


class TokenSettings(JobSettings):
    """Token shards (MDS) of an image folder: discriminative and VQ tokens of the same views."""

    codebook: Annotated[PathText, Option(metavar="NPY")]
    """Centroids [K, E]."""
    vqgan: Annotated[PathText | None, Option(metavar="CKPT")] = None
    """VQGAN; default: discriminative tokens alone."""
    vqgan_config: Annotated[PathText | None, Option(metavar="YAML")] = None
    """Its taming-style configuration; default: the published sizes."""
    views: int | None = Field(None, ge=1)
    """Samples per image; default: 1, and 10 with ten-crop."""
    crops: CropKind = "training"
    """How views are cut: the centre, then random; random; corners and centre; random parts of 8 to 100 %."""
    image_size: int | None = Field(None, ge=1)
    """Side of a view; default: the largest that the encoder takes (256 of DINOv2)."""
    resize: int | None = Field(None, ge=1)
    """Short side before cropping; default: the image size, 1.1 times that for ten-crop."""
    class_order: ClassOrder = "lexicographic"
    """How class folders become labels; numeric for folders that are numbers."""


class VerifySettings(Section):
    """Check token shards: hashes, counts, views, id ranges. With the parts that made the shards, a sample of images is
    tokenised again and compared.
    """

    shards: Annotated[PathText, Option(positional=True, metavar="SHARDS_DIR")]
    """Complete directory of token shards."""
    images: Annotated[PathText | None, Option(metavar="PATH", group="checking a sample of tokens again")] = None
    """The images."""
    labels: Annotated[PathText | None, Option(metavar="FILE", group="checking a sample of tokens again")] = None
    """The file of classes that was given with them."""
    encoder: Annotated[PathText | None, Option(metavar="WEIGHTS", group="checking a sample of tokens again")] = None
    """The encoder's weights."""
    layer: Annotated[int, Option(group="checking a sample of tokens again")] = 3
    """Which block from the end gives the features."""
    num_heads: Annotated[int | None, Option(group="checking a sample of tokens again")] = Field(None, ge=1)
    """Attention heads where they are not those of the published models."""
    codebook: Annotated[PathText | None, Option(metavar="NPY", group="checking a sample of tokens again")] = None
    """The centroids."""
    vqgan: Annotated[PathText | None, Option(metavar="CKPT", group="checking a sample of tokens again")] = None
    """The VQGAN, for shards that hold VQ tokens."""
    vqgan_config: Annotated[PathText | None, Option(metavar="YAML", group="checking a sample of tokens again")] = None
    """Its configuration; default: the published sizes."""
    precision: Annotated[Precision, Option(group="checking a sample of tokens again")] = "fp32"
    """Arithmetic."""
    sample: Annotated[int, Option(group="checking a sample of tokens again")] = Field(64, ge=1)
    """Samples to tokenise again."""
    agreement: Annotated[float, Option(group="checking a sample of tokens again")] = Field(0.99, ge=0, le=1)
    """Smallest share of equal tokens."""
    sheet: Annotated[PathText | None, Option(metavar="PNG", group="checking a sample of tokens again")] = None
    """Write a picture: image, token map, reconstruction."""

    @property
    def again(self) -> bool:
        """Whether a sample is tokenised again."""
        return self.images is not None

    @model_validator(mode="after")
    def _all_parts(self) -> "VerifySettings":
        parts = [self.images, self.encoder, self.codebook]
        if any([*parts, self.sheet]) and not all(parts):
            raise ValueError("checking a sample again and the sheet need all of --images, --encoder and --codebook")
        return self
