"""``digit_ds.load_pipeline``: pictures and their tokens from Python, drawn as ``digit-ds sample`` draws them.

Shapes: ``N`` pictures of ``H`` x ``W`` pixels, ``G`` tokens of a picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.generation.drawing import block_images, grouped, write_codes
from digit_ds.generation.labels import choose_labels, labels_of
from digit_ds.generation.models import (
    Encoding,
    arithmetic,
    check_guidance,
    check_parts,
    decodings,
    first_stage,
    load_encoding,
    load_painter,
    needed_stages,
    read_stages,
)
from digit_ds.generation.pictures import Originals, draw_samples
from digit_ds.generation.pipeline import BLOCK, Pipeline, make_sampler
from digit_ds.generation.settings import DrawSettings, ModelSettings
from digit_ds.generation.sources import GivenImages, ImageFolder
from digit_ds.model.transformer import load_model

Given = Tensor | Sequence[Image.Image | Path | str] | Path | str
"""Pictures: uint8 [N, 3, H, W], a sequence of PIL images or image files, or a folder as for ``--from-images``."""


class Pictures(NamedTuple):
    """Pictures and the tokens that they were decoded from."""

    images: Tensor
    """uint8 [N, 3, H, W]."""
    discriminative: Tensor | None
    """int64 [N, G] codes of the codebook; None for a VQ baseline."""
    vq: Tensor
    """int64 [N, G] codes of the VQGAN."""
    labels: list[int]
    """The class of each picture, -1 for none."""
    class_names: list[str]
    """Names by label; empty where the model has none."""

    originals: Originals | None = None
    """Given pictures, cut as they were tokenised; None for samples."""

    def pil(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return [Image.fromarray(picture) for picture in self.images.permute(0, 2, 3, 1).numpy()]

    def grid(self) -> Image.Image:
        """``grid.png`` of ``digit-ds sample``: a row for each class, at most 16 rows of 10, given pictures above."""
        pictures = self.images.permute(0, 2, 3, 1).numpy()
        return draw_samples(self.labels, self.class_names, lambda image: pictures[image], self.originals)


class LoadedPipeline:
    """Models on one device; made by :func:`load_pipeline`.

    The options of drawing (``count``, ``seed``, ``temperature``, ``top_k``, ``guidance``, ``decoder_top_p``, ...) are
    those of ``digit-ds sample``, with ``_`` for ``-``. For equal options, models and device the pictures are those of
    the command, byte for byte.
    """

    def __init__(self, settings: ModelSettings, device: torch.device):
        self._settings, self._place = settings, arithmetic(settings, device)
        stages = read_stages(settings)
        self._stages = needed_stages(stages, given="prior" not in stages, keep=None)
        self._painter = load_painter(settings, self._place)
        self._encoding: Encoding | None = None
        if settings.encoder is not None or settings.codebook is not None:
            self._encoding = self._load_encoding("encoder and codebook")
        check_parts(settings, self._stages, self._painter, [] if self._encoding is None else self._encoding.parts)
        self._models = {
            name: load_model(model.directory, device, self._place.precision) for name, model in self._stages.items()
        }

    @property
    def class_names(self) -> list[str]:
        """Names of the prior's classes by label; empty where it has none."""
        return [str(name) for name in first_stage(self._stages).provenance.get("classes") or []]

    def sample(self, **options: Any) -> Pictures:
        """Draw pictures.

        Args:
            options: of ``digit-ds sample``, such as ``classes=[1, 7], count=4, top_k=200, seed=0``.

        Raises:
            UserError: an option or a class is unknown, or an option is outside its range.
        """
        return self._draw(_read(options, without=("keep",)), None)

    def reconstruct(self, images: Given, **options: Any) -> Pictures:
        """Reconstruct given pictures from their discriminative tokens.

        Args:
            images: see :data:`Given`; each is cut to a square in its centre.
            options: as for :meth:`sample`; those of the pixel decoder have an effect.

        Raises:
            UserError: there is no pixel decoder, encoder or codebook, or a picture cannot be read.
        """
        return self._draw(_read(options, without=("keep", "per_class")), images)

    def complete(self, images: Given, keep: int, **options: Any) -> Pictures:
        """Keep the first ``keep`` tokens of given pictures, in raster order, and let the prior write the others.

        Args:
            images: see :data:`Given`; each is cut to a square in its centre.
            keep: number of tokens, 0 to G.
            options: as for :meth:`sample`. A class-conditional prior needs ``classes``, one for all pictures or one
                for each; for a folder, the names of its folders are the default.

        Raises:
            UserError: there is no prior, encoder or codebook, or a picture cannot be read.
        """
        return self._draw(_read({**options, "keep": keep}, without=("per_class",)), images)

    def _load_encoding(self, pictures: str) -> Encoding:
        return load_encoding(self._settings, first_stage(self._stages), self._painter, self._place.device, pictures)

    def _draw(self, settings: DrawSettings, images: Given | None) -> Pictures:
        stages = needed_stages(self._stages, images is not None, settings.keep)
        first = first_stage(stages)
        source = None if images is None else self._source(images)
        model = (first.directory, first.spec, first.provenance)
        if source is not None and settings.classes is not None and len(settings.classes) == source.count > 1:
            labels, names = labels_of(*model, settings.classes)[: settings.count], self.class_names
        else:
            labels, names = choose_labels(*model, source, settings.count, settings.per_class, settings.classes)
        decoding = decodings(settings)
        check_guidance(first, decoding["prior"])
        rows = min(self._place.batch, len(labels))
        samplers = {name: make_sampler(self._models[name], decoding[name], settings.seed, rows) for name in stages}
        pipeline = Pipeline(samplers.get("prior"), samplers.get("pixel_decoder"), self._painter)
        drawn = []
        for group in grouped(range(-(-len(labels) // BLOCK)), rows, processes=1):
            numbers = [image for block in group for image in block_images(block, len(labels))]
            drawn.append(write_codes(pipeline, numbers, labels, source, settings.keep))
        discriminative = [codes.discriminative for codes in drawn if codes.discriminative is not None]
        vq = torch.cat([codes.vq for codes in drawn])
        painted = torch.cat([torch.from_numpy(pipeline.paint(block)) for block in vq.split(BLOCK)])
        images = painted.permute(0, 3, 1, 2).contiguous()
        first_codes = torch.cat(discriminative) if discriminative else None
        originals = None if source is None else Originals(source.picture, first.spec.grid, settings.keep)
        return Pictures(images, first_codes, vq, labels, names, originals)

    def _source(self, images: Given) -> ImageFolder | GivenImages:
        """The given pictures as first-stage codes."""
        folder = isinstance(images, (str, Path))
        if self._encoding is None:
            self._encoding = self._load_encoding(str(images) if folder else "given images")
        encoding, device = self._encoding, self._place.device
        if isinstance(images, (str, Path)):
            return ImageFolder(images, encoding.size, encoding.resize, encoding.encode, device)
        return GivenImages(_opened(images), encoding.size, encoding.resize, encoding.encode, device)


def load_pipeline(
    prior: Path | str | None = None,
    decoder: Path | str | None = None,
    vqgan: Path | str | None = None,
    *,
    codebook: Path | str | None = None,
    encoder: Path | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> LoadedPipeline:
    """Load what draws pictures.

    Args:
        prior: model directory, or ``hf://OWNER/NAME``, of a prior, or of a VQ baseline, which needs no decoder; None:
            given pictures can be reconstructed only.
        decoder: model directory, or ``hf://OWNER/NAME``, of a pixel decoder.
        vqgan: VQGAN checkpoint.
        codebook: K-Means codebook; with
        encoder: encoder weights, it makes tokens of given pictures.
        device: where to compute; None: the GPU, or the CPU where there is none.
        options: other options of the models that ``digit-ds sample`` has: ``precision``, ``batch``, ``vqgan_config``,
            ``vqgan_precision``, ``vqgan_compile``, ``num_heads``, ``resize``.

    Raises:
        UserError: a file is missing or damaged, the parts do not belong together, or an option is unknown.
    """
    named = {"prior": prior, "decoder": decoder, "vqgan": vqgan, "codebook": codebook, "encoder": encoder}
    settings = ModelSettings.read({name: path for name, path in named.items() if path is not None} | options)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedPipeline(settings, torch.device(device))


def _read(options: dict[str, Any], without: tuple[str, ...]) -> DrawSettings:
    """Options of drawing; some make no sense for a method."""
    for name in without:
        if name in options:
            raise UserError(
                f"{name}: is not an option here, expected the options of drawing without {' and '.join(without)}"
            )
    classes = options.get("classes")
    return DrawSettings.read(options | ({"classes": list(classes)} if isinstance(classes, (tuple, range)) else {}))


def _opened(images: Tensor | Sequence[Image.Image | Path | str]) -> Sequence[Image.Image | Path | str]:
    """Given pictures as PIL images or files."""
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images: found {images.dtype} {list(images.shape)}, expected uint8 [N, 3, H, W]")
        images = [Image.fromarray(picture) for picture in images.permute(0, 2, 3, 1).cpu().numpy()]
    if not isinstance(images, (list, tuple)) or not all(isinstance(one, (Image.Image, Path, str)) for one in images):
        raise UserError(
            f"images: found {type(images).__name__}, expected uint8 [N, 3, H, W], a folder, or a list of PIL images or "
            "image files"
        )
    if not len(images):
        raise UserError("images: the list is empty, expected at least one image")
    return images
