"""What stands in for MAGE's VQGAN: a small network of the same architecture, trained on the digits without labels.

python -m digit_ds.demo.stand_in_vqgan IMAGES OUT.ckpt OUT.yaml --steps N
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from digit_ds.demo.digits import read_images
from digit_ds.demo.fitting import distort, draw, fit
from digit_ds.errors import run_command
from digit_ds.files import write_atomically
from digit_ds.tokenizer.vqgan_network import VqganNetwork

CODES = 256
CONFIG = {
    "double_z": False,
    "z_channels": 32,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2, 2],  # three halvings: a grid of 4x4
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
BATCH = 16
CONTINUOUS_SHARE = 0.25
"""Share of the steps before the codebook is there: it starts as latents of an autoencoder that can already draw."""
COMMITMENT = 0.25
RESTART_EVERY = 10
RARE = 0.03
"""A code is restarted when it is used less than this share of the average code."""


class _Training(nn.Module):
    """The network and how often each code was used lately."""

    usage: Tensor
    step: Tensor

    def __init__(self, images: Tensor):
        super().__init__()
        self.network = VqganNetwork(CONFIG, CODES).to(memory_format=torch.channels_last)
        self.images = images
        self.register_buffer("usage", torch.zeros(CODES))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def loss(self, share: float) -> Tensor:
        """Reconstruction, codebook and commitment terms with a straight-through gradient; no discriminator."""
        images = distort(draw(self.images, BATCH), turn=0.1, stretch=0.05, move=2)
        latents = self.network.encode(images.contiguous(memory_format=torch.channels_last))  # [B, C, h, w]
        if share < CONTINUOUS_SHARE:
            return 10 * _difference(self.network.decode(latents), images)
        vectors = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)  # [B*h*w, C]
        codebook = self.network.codebook.weight
        if self.step == 0:
            codebook.data.copy_(vectors[torch.randperm(len(vectors))[:CODES]])  # B*h*w is at least CODES
        codes = self.network.quantise(latents.detach())
        self.usage.mul_(0.99).add_(torch.bincount(codes.flatten(), minlength=CODES))
        quantised = self.network.embed(codes)
        painted = self.network.decode(latents + (quantised - latents).detach())
        loss = (
            10 * _difference(painted, images)
            + F.mse_loss(quantised, latents.detach())
            + COMMITMENT * F.mse_loss(latents, quantised.detach())
        )
        self.step += 1
        if self.step % RESTART_EVERY == 0 and share < 0.8:
            self._restart_rare_codes(codebook, vectors)
        return loss

    def _restart_rare_codes(self, codebook: Tensor, vectors: Tensor) -> None:
        rare = (self.usage < RARE * self.usage.mean()).nonzero().flatten()
        # .data: the loss just computed still needs the old rows' graph, which an in-place change would invalidate.
        codebook.data[rare] = vectors[torch.randint(len(vectors), (len(rare),))]
        self.usage[rare] = self.usage.mean()


def _difference(painted: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of the pixels and of the steps between neighbours, which keep strokes sharp and apart."""
    return F.mse_loss(painted, images) + sum(
        F.mse_loss(painted.diff(dim=axis), images.diff(dim=axis)) for axis in (-2, -1)
    )


def train_vqgan(images: Path, checkpoint: Path, config: Path, steps: int) -> None:
    """Train on the image folder ``images``; write a taming-style checkpoint and its YAML configuration."""
    torch.manual_seed(1)
    training = _Training(read_images(images))
    unfinished = checkpoint.with_name(f"{checkpoint.name}.unfinished")
    fit(
        training,
        training.loss,
        steps=steps,
        learning_rate=2e-3,
        weight_decay=0.0,
        matrices=[parameter for parameter in training.network.parameters() if parameter.ndim == 4],
        unfinished=unfinished,
        description="VQGAN stand-in",
    )
    parameters = {"embed_dim": CONFIG["z_channels"], "n_embed": CODES, "ddconfig": CONFIG}
    text = yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": parameters}}, sort_keys=False)
    write_atomically(config, lambda path: path.write_text(text, encoding="utf-8"))
    state = {name: value.contiguous() for name, value in training.network.state_dict().items()}
    write_atomically(checkpoint, lambda path: torch.save({"state_dict": state}, path))
    unfinished.unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of training images")
    parser.add_argument("checkpoint", type=Path, help="file to write")
    parser.add_argument("config", type=Path, help="YAML configuration to write")
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args(arguments)
    train_vqgan(options.images, options.checkpoint, options.config, options.steps)


if __name__ == "__main__":
    run_command(main)
