"""What stands in for DINOv2: a small ViT of the same architecture, trained on the digits without labels.

python -m digit_ds.demo.stand_in_encoder IMAGES OUT.pth --steps N

Each patch feature of a distorted view, in which some patches are hidden, has to predict its own pixels (as in masked
image modelling) and what the whole undistorted picture shows: its histograms of oriented gradients (as in MaskFeat,
arXiv 2112.09133) and its place in the spectral embedding of the training pictures (Laplacian eigenmaps, Belkin and
Niyogi 2003), in which pictures with similar histograms lie together. This takes the place of DINO's loss, which needs
far more images. The loss sits on the block that the pipeline reads, the third from the end. The blocks after it are
never computed and keep their initial weights.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import eigsh
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from digit_ds.demo.digits import read_images
from digit_ds.demo.fitting import distort, fit
from digit_ds.demo.hog import describe
from digit_ds.demo.picture_sets import SIZE
from digit_ds.errors import run_command
from digit_ds.files import write_atomically

PATCH = 8
GRID = SIZE // PATCH
WIDTH = 64
DEPTH = 5
LAYER = 3
"""The block from the end whose features the pipeline uses."""
BATCH = 64
LARGEST_HIDDEN_SHARE = 0.3
NEIGHBOURS, COORDINATES = 10, 32
"""Of the spectral embedding: pictures that a picture is linked to, and eigenvectors."""
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class _Training(nn.Module):
    """The ViT and the heads that are thrown away."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.images = images
        strokes = describe(images)
        self.strokes = (strokes - strokes.mean(0)) / strokes.std()  # [N, S]
        self.place = spectral_embedding(strokes)  # [N, C]
        self.vit = VisionTransformer(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=WIDTH // 64,
            init_values=1.0,
            reg_tokens=4,
            no_embed_class=True,  # positions belong to the patches; the class token's row stays zero
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.mask_token = nn.Parameter(torch.zeros(1, WIDTH))
        self.own_pixels = nn.Linear(WIDTH, PATCH * PATCH)
        self.whole_picture = nn.Linear(WIDTH, self.strokes.shape[1] + self.place.shape[1])
        # Sinusoidal positions: learned ones from a random start take hundreds of steps longer.
        assert self.vit.pos_embed is not None
        self.vit.pos_embed.data.copy_(0.5 * _sines(WIDTH, GRID))
        for module in self.vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The weight matrices of the blocks that are trained."""
        return [p for block in self.vit.blocks[: DEPTH - LAYER + 1] for p in block.parameters() if p.ndim == 2]

    def loss(self, _share: float) -> Tensor:
        """The weighted sum of the three errors."""
        chosen = torch.randint(len(self.images), (BATCH,))
        views = distort(self.images[chosen], turn=0.15, stretch=0.1, move=2.5)  # [B, 3, H, W]
        hidden = torch.rand(BATCH, GRID * GRID) < LARGEST_HIDDEN_SHARE * torch.rand(BATCH, 1)  # [B, G]
        features = self.features(views, hidden)  # [B, G, D]
        pixels = F.unfold(views[:, :1], PATCH, stride=PATCH).transpose(1, 2)  # [B, G, P*P]; grey: one channel says all
        strokes, place = self.whole_picture(features).split((self.strokes.shape[1], self.place.shape[1]), -1)
        return (
            15 * F.mse_loss(self.own_pixels(features), pixels)
            + 0.3 * F.mse_loss(strokes, self.strokes[chosen, None].expand_as(strokes))
            + 3 * F.mse_loss(place, self.place[chosen, None].expand_as(place))
        )

    def features(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Normed patch features [B, G, D] of the block that the pipeline reads; ``hidden`` patches are masked."""
        patches = self.vit.patch_embed((images - MEAN) / STD)
        patches = torch.where(hidden[..., None], self.mask_token, patches)
        tokens = self.vit._pos_embed(patches)  # class token and registers in front
        for block in self.vit.blocks[: DEPTH - LAYER + 1]:
            tokens = block(tokens)
        return self.vit.norm(tokens)[:, self.vit.num_prefix_tokens :]

    def published_state(self) -> dict[str, Tensor]:
        """The weights under the names of ``dinov2_vitb14_reg4_pretrain.pth``."""
        state = dict(self.vit.state_dict())
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH), state["pos_embed"]], 1)
        state["mask_token"] = self.mask_token.detach()
        return state


def _sines(width: int, grid: int) -> Tensor:
    """Sines and cosines of row and column: [1, grid * grid, width]."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequencies = 1.5 * torch.exp(-math.log(20) * torch.arange(width // 4) / (width // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)[None]


def spectral_embedding(points: Tensor) -> Tensor:
    """Points [N, S] -> their coordinates [N, COORDINATES] on the graph of nearest neighbours.

    The eigenvectors of the graph's random walk after eight steps, each with the standard deviation of its eigenvalue.
    """
    distances, neighbours = torch.cdist(points, points).fill_diagonal_(float("inf")).topk(NEIGHBOURS, largest=False)
    scale = distances[:, -1]  # of each point: its distance from the last neighbour
    weights = torch.exp(-distances.square() / (scale[:, None] * scale[neighbours]))
    rows = np.repeat(np.arange(len(points)), NEIGHBOURS)
    graph = coo_matrix((weights.flatten().double().numpy(), (rows, neighbours.flatten().numpy()))).tocsr()
    graph = graph.maximum(graph.T)
    root = diags(np.asarray(graph.sum(1)).ravel() ** -0.5)
    start = np.ones(len(points))  # the solver's own start is random
    values, vectors = eigsh(root @ graph @ root, COORDINATES + 1, which="LA", v0=start)
    order = np.argsort(-values)[1:]  # the first one is constant
    coordinates = root @ vectors[:, order]
    return torch.from_numpy(coordinates / coordinates.std(0) * values[order] ** 8).float()


def train_encoder(images: Path, weights: Path, steps: int) -> None:
    """Train on the image folder ``images``; write a checkpoint in DINOv2's published form."""
    torch.manual_seed(0)
    training = _Training(read_images(images))
    unfinished = weights.with_name(f"{weights.name}.unfinished")
    fit(
        training,
        training.loss,
        steps=steps,
        learning_rate=2e-3,
        weight_decay=0.04,
        matrices=training.matrices,
        unfinished=unfinished,
        description="DINOv2 stand-in",
    )
    write_atomically(weights, lambda path: torch.save(training.published_state(), path))
    unfinished.unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of training images")
    parser.add_argument("weights", type=Path, help="file to write")
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args(arguments)
    train_encoder(options.images, options.weights, options.steps)


if __name__ == "__main__":
    run_command(main)
