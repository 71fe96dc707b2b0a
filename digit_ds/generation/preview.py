"""A grid of pictures of a model in training, for TensorBoard."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.generation.pictures import draw_grid
from digit_ds.generation.pipeline import BLOCK, Pipeline, make_sampler
from digit_ds.generation.settings import Decoding
from digit_ds.model.decoder import load_model
from digit_ds.parallel import launch
from digit_ds.tokenizer.vqgan import load_vqgan


def sample_grid(
    model_dir: Path | str,
    *,
    vqgan: Path | str,
    vqgan_config: Path | str | None = None,
    partner: Path | str | None = None,
    rows: int = 8,
    columns: int = 8,
    prior_decoding: Decoding | None = None,
    pixel_decoding: Decoding | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw ``rows`` x ``columns`` pictures in this process alone; the same seed shows the same images over a training
    run.

    Args:
        model_dir: released model: a prior, a pixel decoder, or a VQ baseline.
        vqgan: paints; ``vqgan_config`` as for ``load_vqgan``.
        partner: the released model of the other stage; none for a VQ baseline.
        rows: with a class-conditional prior, the first classes, one a row.
        columns: pictures of a row.
        prior_decoding: how first-stage tokens are drawn.
        pixel_decoding: how VQ tokens are drawn.
        seed: of the random numbers.

    Returns:
        uint8 [3, H, W].
    """
    device = launch.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {}
    for directory in (model_dir, partner):
        if directory is not None:
            model = load_model(directory, device, dtype)
            models["pixels" if model.spec.vocabulary.has_prefix else "prior"] = model
    if "prior" not in models or ("pixels" in models) == (models["prior"].spec.kind == "vq"):
        raise UserError(
            f"{model_dir}: cannot be previewed with {partner}, expected a prior and a pixel decoder, or a vq model"
        )
    count = rows * columns
    decodings = {"prior": prior_decoding or Decoding(), "pixels": pixel_decoding or Decoding()}
    samplers = {name: make_sampler(model, decodings[name], seed, count) for name, model in models.items()}
    pipeline = Pipeline(samplers["prior"], samplers.get("pixels"), load_vqgan(vqgan, vqgan_config, device))
    classes = models["prior"].spec.classes
    labels = torch.arange(rows).repeat_interleave(columns) % classes if classes else None
    codes = pipeline.write(torch.arange(count), labels)
    pictures = np.concatenate([pipeline.paint(block) for block in codes.vq.split(BLOCK)])
    names = [str(row % classes) if classes else "" for row in range(rows)]
    grid = draw_grid([(name, pictures[row * columns : (row + 1) * columns]) for row, name in enumerate(names)])
    return torch.from_numpy(np.array(grid)).permute(2, 0, 1)
