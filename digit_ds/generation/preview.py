"""Pictures of a model in training: a grid for TensorBoard, a small sample for scores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.generation.pictures import draw_grid
from digit_ds.generation.pipeline import BLOCK, Pipeline, make_sampler
from digit_ds.generation.settings import Decoding
from digit_ds.identity import Part, check_agreement
from digit_ds.model.released import read_config
from digit_ds.model.transformer import load_model
from digit_ds.parallel import launch
from digit_ds.tokenizer.vqgan import load_vqgan

BATCH = 256
"""Pictures of one model call at most: a training run leaves little memory."""
PLAIN = Decoding()


@dataclass(frozen=True)
class Preview:
    """Draws in this process alone; the same seed shows the same images over a training run."""

    vqgan: Path | str
    """VQGAN checkpoint; ``vqgan_config`` as for ``load_vqgan``."""
    vqgan_config: Path | str | None = None
    partner: Path | str | None = None
    """The released model of the other stage; none for a VQ baseline."""
    prior_decoding: Decoding = PLAIN
    """How first-stage tokens are drawn."""
    pixel_decoding: Decoding = PLAIN
    """How VQ tokens are drawn."""
    seed: int = 0

    def grid(self, model_dir: Path | str, rows: int = 8, columns: int = 8) -> Tensor:
        """A labelled grid, uint8 [3, H, W]; with a class-conditional prior the first classes, one a row.

        Raises:
            UserError: ``model_dir``, ``partner`` and the VQGAN do not belong together.
        """
        pipeline = self._pipeline(model_dir, rows * columns)
        classes = _classes(pipeline)
        labels = torch.arange(rows).repeat_interleave(columns) % classes if classes else None
        pictures = _paint(pipeline, rows * columns, labels)
        named = []
        for row in range(rows):
            name = str(row % classes) if classes else ""
            named.append((name, list(pictures[row * columns : (row + 1) * columns])))
        return torch.from_numpy(np.array(draw_grid(named))).permute(2, 0, 1)

    def pictures(self, model_dir: Path | str, count: int) -> np.ndarray:
        """``count`` pictures, classes in turn as ``digit-ds sample --count`` draws them: uint8 [N, H, W, 3].

        Raises:
            UserError: ``model_dir``, ``partner`` and the VQGAN do not belong together.
        """
        pipeline = self._pipeline(model_dir, count)
        classes = _classes(pipeline)
        return _paint(pipeline, count, torch.arange(count) % classes if classes else None)

    def _pipeline(self, model_dir: Path | str, count: int) -> Pipeline:
        """Both models and the VQGAN, on this process's device."""
        device = launch.device()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        models = {}
        for directory in (model_dir, self.partner):
            if directory is not None:
                model = load_model(directory, device, dtype)
                models["pixels" if model.spec.vocabulary.has_prefix else "prior"] = model
        if "prior" not in models or ("pixels" in models) == (models["prior"].spec.kind == "vq"):
            raise UserError(
                f"{model_dir}: cannot be previewed with {self.partner}, expected a prior and a pixel decoder, or a vq "
                "model"
            )
        vqgan = load_vqgan(self.vqgan, self.vqgan_config, device)
        parts = [Part(f"model {path}", read_config(Path(path))[1]) for path in (model_dir, self.partner) if path]
        check_agreement([*parts, Part(f"VQGAN {self.vqgan}", {"vqgan_sha256": vqgan.sha256})])
        decodings = {"prior": self.prior_decoding, "pixels": self.pixel_decoding}
        samplers = {
            name: make_sampler(model, decodings[name], self.seed, min(count, BATCH)) for name, model in models.items()
        }
        return Pipeline(samplers["prior"], samplers.get("pixels"), vqgan)


def _classes(pipeline: Pipeline) -> int:
    assert pipeline.prior is not None
    return pipeline.prior.spec.classes


def _paint(pipeline: Pipeline, count: int, labels: Tensor | None) -> np.ndarray:
    """Images 0 .. ``count`` - 1 as uint8 [N, H, W, 3]."""
    codes = pipeline.write(torch.arange(count), labels)
    return np.concatenate([pipeline.paint(block) for block in codes.vq.split(BLOCK)])
