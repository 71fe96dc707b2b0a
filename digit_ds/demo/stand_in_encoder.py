"""What stands in for DINOv2: a small ViT of the same architecture, trained on the digits without labels.

python -m digit_ds.demo.stand_in_encoder IMAGES OUT.pth --steps N

Two distorted views of an image, with some patches hidden, have to agree on what they show (InfoNCE on the mean patch
feature, in place of DINO's loss, which needs far more images); each patch feature has to tell its own pixels (as in
masked image modelling) and, roughly, the undistorted picture. The losses sit on the last block and on the block that
the pipeline reads, the third from the end.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from digit_ds.demo.digits import SIZE, read_images
from digit_ds.demo.fitting import distort, draw, fit
from digit_ds.errors import run_command
from digit_ds.files import write_atomically

PATCH = 8
GRID = SIZE // PATCH
WIDTH = 64
DEPTH = 5
LAYER = 3
"""The block from the end whose features the pipeline uses."""
BATCH = 32
LARGEST_HIDDEN_SHARE = 0.6
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class _Training(nn.Module):
    """The ViT and the heads that are thrown away."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.images = images
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
        self.whole_picture = nn.Linear(WIDTH, GRID * GRID)
        self.identity = nn.Linear(WIDTH, 64)
        # Sinusoidal positions: learned ones from a random start take hundreds of steps longer.
        assert self.vit.pos_embed is not None
        self.vit.pos_embed.data.copy_(0.5 * _sines(WIDTH, GRID))
        for module in self.vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def loss(self, _share: float) -> Tensor:
        """The sum of the three terms over both blocks."""
        originals = draw(self.images, BATCH).repeat(2, 1, 1, 1)  # [2B, 3, H, W]
        views = distort(originals, turn=0.15, stretch=0.1, move=2.5)
        hidden = torch.rand(len(views), GRID * GRID) < LARGEST_HIDDEN_SHARE * torch.rand(len(views), 1)  # [2B, G]
        pixels = F.unfold(views[:, :1], PATCH, stride=PATCH).transpose(1, 2)  # [2B, G, P*P]; grey: one channel says all
        picture = F.avg_pool2d(originals[:, 0], PATCH).flatten(1)[:, None].expand(-1, GRID * GRID, -1)  # [2B, G, G]
        partner = torch.arange(len(views)).roll(BATCH)
        total = views.new_zeros(())
        for features in self._features(views, hidden):  # [2B, G, E]
            identity = F.normalize(self.identity(features.mean(1)), dim=-1)
            likeness = (identity @ identity.T / 0.2).fill_diagonal_(float("-inf"))
            total = total + (
                10 * F.mse_loss(self.own_pixels(features), pixels)
                + 3 * F.mse_loss(self.whole_picture(features), picture)
                + 0.3 * F.cross_entropy(likeness, partner)
            )
        return total

    def _features(self, images: Tensor, hidden: Tensor) -> list[Tensor]:
        """Normed patch features of the two blocks with a loss."""
        patches = self.vit.patch_embed((images - MEAN) / STD)
        patches = torch.where(hidden[..., None], self.mask_token, patches)
        tokens = self.vit._pos_embed(patches)  # class token and registers in front
        features = []
        for index, block in enumerate(self.vit.blocks):
            tokens = block(tokens)
            if index in (DEPTH - LAYER, DEPTH - 1):
                features.append(self.vit.norm(tokens)[:, self.vit.num_prefix_tokens :])
        return features

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


def train_encoder(images: Path, weights: Path, steps: int) -> None:
    """Train on the image folder ``images``; write a checkpoint in DINOv2's published form."""
    torch.manual_seed(0)
    training = _Training(read_images(images))
    unfinished = weights.with_name(f"{weights.name}.unfinished")
    fit(
        training,
        training.loss,
        steps=steps,
        learning_rate=3e-3,
        weight_decay=0.04,
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
