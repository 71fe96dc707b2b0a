"""Images -> features: one block's output of a frozen self-supervised vision transformer.

Shapes: `B` images, `G` patches, `E` encoder width.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.safe_load import load_strictly
from digit_ds.tokenizer.precision import without_tf32
from digit_ds.tokenizer.vit_checkpoints import VitCheckpoint, read_vit_checkpoint

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NATIVE_SIZE = 224  # the published image size; DINOv2's own position table is for 518
_SHRINK = 0.875  # published: an image of 256 becomes one of 224
_GRID_OFFSET = 0.1  # published: the position table is scaled by (grid + 0.1) / table


class Encoder(nn.Module):
    """A frozen vision transformer cut off after the asked block: float [B, 3, H, W] in [0, 1] -> [B, G, E].

    The features are the block's output after the final LayerNorm, without class and register tokens, row by row.
    Normalisation and resizing run in float32, the transformer in the dtype that ``load_encoder`` was given. The
    forward pass makes no host-device synchronisation, and ``torch.compile`` may wrap it.

    Attributes:
        width: E. layer, depth, num_heads, patch_size: as the checkpoint and ``load_encoder`` gave them.
        image_sizes: the accepted heights (= widths).
    """

    prefix: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, checkpoint: VitCheckpoint, layer: int, num_heads: int, dtype: torch.dtype, path: Path | str):
        super().__init__()
        self.width, self.depth, self.patch_size = checkpoint.width, checkpoint.depth, checkpoint.patch_size
        self.layer, self.num_heads = layer, num_heads
        self._architecture = (
            f"{checkpoint.layout} width {self.width} depth {self.depth} heads {num_heads} patch {self.patch_size} "
            f"registers {checkpoint.registers.shape[1]} positions {checkpoint.table}x{checkpoint.table}"
        )
        self._file_hash = sha256(path)
        self._network_sizes = _network_sizes(checkpoint)
        self.image_sizes = tuple(sorted(self._network_sizes))
        # Extra tokens and positions are added here: timm would interpolate the table otherwise than published.
        kept_blocks = self.depth - layer + 1
        self.vit = VisionTransformer(
            img_size=self.image_sizes[0],
            patch_size=self.patch_size,
            embed_dim=self.width,
            depth=kept_blocks,
            num_heads=num_heads,
            # timm truncates width * mlp_ratio: the half keeps a rounded product from losing a unit.
            mlp_ratio=(checkpoint.hidden + 0.5) / self.width,
            mlp_layer=SwiGLUPacked if checkpoint.gated else Mlp,  # type: ignore[arg-type]  # a partial, as in timm
            act_layer=nn.SiLU if checkpoint.gated else nn.GELU,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            class_token=False,
            pos_embed="none",
            global_pool="",
            num_classes=0,
            weight_init="skip",
            device="meta",
        )
        state = _fold_layer_scale(_keep_blocks(checkpoint.state, kept_blocks))
        load_strictly(self.vit, {name: value.to(dtype, copy=True) for name, value in state.items()}, path)
        self.vit.to(memory_format=torch.channels_last)  # of the one convolution: cuDNN's fast path for 3 channels
        # [1, 1 + R, E]: positions are added to the class token, registers get none.
        class_token = checkpoint.class_token + checkpoint.positions[:, :1]
        self.register_buffer("prefix", torch.cat([class_token, checkpoint.registers], 1).to(dtype), persistent=False)
        for grid in {size // self.patch_size for size in self._network_sizes.values()}:
            table = interpolate_positions(checkpoint.positions[:, 1:], grid)  # [1, G, E]
            self.register_buffer(f"positions_{grid}", table.to(dtype), persistent=False)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of the features of an image of that size."""
        self._check_size(image_size, image_size)
        side = self._network_sizes[image_size] // self.patch_size
        return side, side

    def provenance(self) -> dict[str, Any]:
        """What the features depend on, JSON-able: weights file, architecture, layer and transform."""
        shrunk = [f"{size} scaled to {to}" for size, to in self._network_sizes.items() if size != to]
        return {
            "encoder_sha256": self._file_hash,
            "architecture": self._architecture,
            "layer": self.layer,
            "transform": ", ".join(["ImageNet mean and deviation", *shrunk]),
        }

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise, and shrink the sizes that are published as shrunk; float32, before the cast to the network's."""
        height, width = images.shape[-2:]
        self._check_size(height, width)
        if not images.is_floating_point():
            raise UserError(f"images are {images.dtype}, expected floating point in [0, 1]")
        images = (images.float() - self.mean) / self.std
        if self._network_sizes[height] != height:
            images = F.interpolate(images, scale_factor=_SHRINK, mode="bicubic")
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, G, E] of float images [B, 3, H, W] in [0, 1].

        Raises:
            UserError: the images are not floating point, not square or not of one of ``image_sizes``.
        """
        images = self.preprocess(images)
        positions = getattr(self, f"positions_{images.shape[-1] // self.patch_size}")
        images = images.to(dtype=positions.dtype, memory_format=torch.channels_last)
        with without_tf32(images):
            patches = self.vit.patch_embed.proj(images).flatten(2).transpose(1, 2)  # [B, G, E]
            prefix = self.prefix.expand(len(images), -1, -1)
            tokens = self.vit.blocks(torch.cat([prefix, patches + positions], 1))  # [B, 1 + R + G, E]
        return self.vit.norm(tokens[:, prefix.shape[1] :])

    def _check_size(self, height: int, width: int) -> None:
        if height != width or height not in self._network_sizes:
            expected = " or ".join(f"{size}x{size}" for size in self.image_sizes)
            raise UserError(f"images are {height}x{width}, this encoder takes {expected}")


def load_encoder(
    weights: Path | str,
    layer: int = 3,
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load a frozen encoder from a published checkpoint of DINOv2, MAE, MoCo v3 or iBOT.

    Width, depth, patch size, position table and register count are read from the file. In float32 the features are
    those of the published DiGIT code, which differ from the hub's DINOv2: the position table is scaled by
    (grid + 0.1) / table without antialiasing.

    Args:
        weights: the checkpoint file.
        layer: which block's output, counted from the end: 1 is the last, 3 the published choice. Later blocks are
            neither kept nor computed.
        num_heads: attention heads, which cannot be seen from the weights; default ``width // 64``.
        device: where to put it.
        dtype: of the transformer and its features.

    Raises:
        UserError: the file is no such checkpoint, or layer or heads do not fit it.
    """
    checkpoint = read_vit_checkpoint(weights)
    width, depth = checkpoint.width, checkpoint.depth
    if not 1 <= layer <= depth:
        raise UserError(f"layer is {layer}, expected 1 (the last block) to {depth} (the first) for {weights}")
    if num_heads is None and width % 64:
        raise UserError(f"{weights}: its width {width} is no multiple of 64, expected the head count as num_heads")
    num_heads = width // 64 if num_heads is None else num_heads
    if num_heads < 1 or width % num_heads:
        raise UserError(f"num_heads is {num_heads}, expected a divisor of the width {width} of {weights}")
    encoder = Encoder(checkpoint, layer, num_heads, dtype, weights)
    return encoder.to(device).eval().requires_grad_(False)


def interpolate_positions(table: Tensor, grid: int) -> Tensor:
    """Scale a position table [1, n * n, E] to [1, grid * grid, E] as the published code does (float32).

    Bicubic, no antialiasing, sampling step n / (grid + 0.1); an equal size is left untouched.
    """
    side, width = math.isqrt(table.shape[1]), table.shape[2]
    if side == grid:
        return table
    scale = (grid + _GRID_OFFSET) / side
    square = table.float().reshape(1, side, side, width).permute(0, 3, 1, 2)
    scaled = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return scaled.permute(0, 2, 3, 1).reshape(1, grid * grid, width)


def _network_sizes(checkpoint: VitCheckpoint) -> dict[int, int]:
    """Accepted image size -> size at which the network sees it.

    The native size is what the position table was made for; a table for more than 224 (DINOv2's is for 518) is
    scaled down to that. 8/7 of the native size, 256 for 224, is published as shrunk to it with DINOv2; the other
    encoders, whose patches of 16 divide it, see it whole: a grid of 16x16 instead of 14x14.
    """
    patch_size = checkpoint.patch_size
    native = checkpoint.table * patch_size
    if native > _NATIVE_SIZE and _NATIVE_SIZE % patch_size == 0:
        native = _NATIVE_SIZE
    sizes = {native: native}
    large, rest = divmod(native * 8, 7)
    if rest == 0 and checkpoint.layout == "DINOv2":
        sizes[large] = native
    elif rest == 0 and large % patch_size == 0:
        sizes[large] = large
    return sizes


def _keep_blocks(state: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The weights without those of blocks past the first ``count``."""
    kept = {f"blocks.{index}" for index in range(count)}
    return {
        name: value
        for name, value in state.items()
        if not name.startswith("blocks.") or ".".join(name.split(".")[:2]) in kept
    }


def _fold_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply each LayerScale into the matrix before it: one product at loading instead of one for every image."""
    folded = dict(state)
    for name in state:
        for scale, matrix in ((".ls1.gamma", ".attn.proj"), (".ls2.gamma", ".mlp.fc2")):
            weight, bias = (name.replace(scale, f"{matrix}.{kind}") for kind in ("weight", "bias"))
            # A scale without its matrix is left where it is, for the strict loading to complain about.
            if name.endswith(scale) and weight in state and state[weight].shape[:1] == state[name].shape:
                gamma = folded.pop(name)  # [E]
                folded[weight] = gamma[:, None] * state[weight]
                if bias in state:
                    folded[bias] = gamma * state[bias]
    return folded
