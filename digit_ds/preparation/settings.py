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
    """Split a folder of images into two folders of links, OUT/train and OUT/val; a share of each class is held out."""

    NOT_RECORDED = frozenset({"images", "out"})
    FIRST_RECORDED = frozenset({"share", "seed"})

    images: Annotated[PathText, Option(metavar="DIR")]
    """Folder of images, or of a folder for each class; nothing in it is moved or copied."""
    out: PathText
    """New folder."""
    share: float = Field(0.1, gt=0, lt=1)
    """Share of each class that is held out, at least one image."""
    seed: int = 0
    """Seed of the split, which depends only on the seed and on the names of the images."""


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
    layer: int = Field(3, ge=1)
    """Encoder block whose output is used, counted from the last, which is 1."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads of the encoder; default: those of the published models, width // 64 for most."""
    out: PathText
    """New directory, or the directory of the same job, which then continues."""
    flips: Annotated[bool, Option(name="flip")] = True
    """Flip random views horizontally with probability 0.5; ``--no-flip`` for images whose meaning it changes, such as
    digits."""
    seed: int = 0
    """Seed of crops, flips and kept patches, which depend only on the seed and on the name of the image."""
    batch: int = Field(256, ge=1)
    """Views per forward pass."""
    precision: Precision = "fp32"
    """Floating-point precision of the networks."""
    compile: bool = False
    """Compile the networks with torch.compile: faster after about a minute of compilation; rounding differs."""
    decoder: JpegDecoder = "cpu"
    """Where JPEG files are decoded; a GPU decodes some pixels to values that differ by 1 or 2 of 255."""
    workers: int | None = Field(None, ge=0)
    """Decoding processes per rank; default: all cores, divided among the ranks of the machine."""
    block_images: int = Field(1024, ge=1)
    """Images per chunk or block of shards; an interrupted job restarts at a whole one."""
    max_skipped: float = Field(0.25, ge=0, le=1)
    """Largest accepted share of unreadable images."""


class FeatureSettings(JobSettings):
    """Extract the encoder's features of one random crop of each image, for K-Means."""

    image_size: int | None = Field(None, ge=1)
    """Side of the crop in pixels, to which the short side is scaled first; default: the encoder's (DINOv2: 224)."""
    points: int | None = Field(None, ge=1)
    """Number of random patches to keep of each image; default: all."""
    fraction: float | None = Field(None, gt=0, le=1)
    """Probability with which each patch is kept; excludes ``--points``."""
    dtype: Precision = "fp16"
    """Data type of the stored features."""

    @model_validator(mode="after")
    def _one_of(self) -> "FeatureSettings":
        if self.points is not None and self.fraction is not None:
            raise ValueError("points and fraction are both given, expected one of them")
        return self


class TokenSettings(JobSettings):
    """Tokenise images into token shards (MDS): discriminative and VQ tokens of the same views."""

    codebook: Annotated[PathText, Option(metavar="NPY")]
    """Codebook: centroids, .npy [K, E]."""
    vqgan: Annotated[PathText | None, Option(metavar="CKPT")] = None
    """VQGAN checkpoint; default: none, only discriminative tokens are written."""
    vqgan_config: Annotated[PathText | None, Option(metavar="YAML")] = None
    """Configuration of the VQGAN, taming-style YAML; default: a .yaml of the checkpoint's name beside it, or MAGE's."""
    views: int | None = Field(None, ge=1)
    """Views, each one sample, per image; default: 1, with ten-crop 10."""
    crops: CropKind = "training"
    """Crops of an image. training: the centre, then random ones; random: random ones only; ten-crop: corners and
    centre, each also flipped; random-resized-crop: random parts of 8 to 100 % of the area."""
    image_size: int | None = Field(None, ge=1)
    """Side of a view in pixels; default: the largest that the encoder accepts (DINOv2: 256)."""
    resize: int | None = Field(None, ge=1)
    """Short side in pixels to which images are resized before cropping; default: the image size, for ten-crop 1.1
    times that."""
    class_order: ClassOrder = "lexicographic"
    """Order in which class folders are numbered as labels; numeric for folders named by numbers."""


class VerifySettings(Section):
    """Check token shards: hashes, counts, views, id ranges. With ``--images``, ``--encoder`` and ``--codebook``, a
    sample of the images is also tokenised again and compared.
    """

    shards: Annotated[PathText, Option(positional=True, metavar="SHARDS_DIR")]
    """Complete directory of token shards."""
    images: Annotated[PathText | None, Option(metavar="PATH", group="tokenising a sample again")] = None
    """Images that the shards were made from."""
    labels: Annotated[PathText | None, Option(metavar="FILE", group="tokenising a sample again")] = None
    """File of classes that was given to tokenize, if any."""
    encoder: Annotated[PathText | None, Option(metavar="WEIGHTS", group="tokenising a sample again")] = None
    """Encoder weights that the shards were made with."""
    layer: Annotated[int, Option(group="tokenising a sample again")] = Field(3, ge=1)
    """Encoder block whose output is used, counted from the last, which is 1."""
    num_heads: Annotated[int | None, Option(group="tokenising a sample again")] = Field(None, ge=1)
    """Attention heads of the encoder; default: those of the published models."""
    codebook: Annotated[PathText | None, Option(metavar="NPY", group="tokenising a sample again")] = None
    """Codebook (.npy) that the shards were made with."""
    vqgan: Annotated[PathText | None, Option(metavar="CKPT", group="tokenising a sample again")] = None
    """VQGAN that the shards were made with, if they hold VQ tokens."""
    vqgan_config: Annotated[PathText | None, Option(metavar="YAML", group="tokenising a sample again")] = None
    """Configuration of the VQGAN, taming-style YAML; default: a .yaml of the checkpoint's name beside it, or MAGE's."""
    precision: Annotated[Precision, Option(group="tokenising a sample again")] = "fp32"
    """Floating-point precision of the networks."""
    sample: Annotated[int, Option(group="tokenising a sample again")] = Field(64, ge=1)
    """Number of samples to tokenise again."""
    agreement: Annotated[float, Option(group="tokenising a sample again")] = Field(0.99, ge=0, le=1)
    """Smallest accepted share of equal tokens."""
    sheet: Annotated[PathText | None, Option(metavar="PNG", group="tokenising a sample again")] = None
    """Also write an overview of the sample: image, token map, reconstruction."""

    @property
    def again(self) -> bool:
        """Whether a sample is tokenised again."""
        return self.images is not None

    @model_validator(mode="after")
    def _all_parts(self) -> "VerifySettings":
        parts = [self.images, self.encoder, self.codebook]
        if any([*parts, self.sheet]) and not all(parts):
            raise ValueError(
                "--images, --encoder, --codebook or --sheet is given alone, expected the first three together to "
                "tokenise a sample again"
            )
        return self
