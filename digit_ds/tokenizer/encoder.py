"""Images -> features: one block's output of a frozen self-supervised vision transformer.

Shapes: `B` images, `G` patches, `E` encoder width.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.safe_load import load_strictly
from digit_ds.tokenizer.precision import without_tf32
from digit_ds.tokenizer.rotary import RotaryBlock, default_periods, rotation
from digit_ds.tokenizer.vit_checkpoints import VitCheckpoint, read_vit_checkpoint
from digit_ds.tokenizer.vit_families import FAMILIES

_NATIVE_SIZE = 224  # the published image size; DINOv2's own position table is for 518
_ROTARY_GRID = 16  # DINOv3 was trained on 256 pixels in patches of 16
_SHRINK = 0.875  # published: an image of 256 becomes one of 224


class Encoder(nn.Module):
    """A frozen vision transformer up to a chosen block: float [B, 3, H, W] in [0, 1] -> [B, G, E].

    The features are the block's output after the final LayerNorm, without class and register tokens, row by row.
    Normalisation and resizing run in float32, the transformer in the dtype that ``load_encoder`` was given. The
    forward pass makes no host-device synchronisation, and ``torch.compile`` may wrap it. ``load_encoder`` makes one.

    Args:
        checkpoint: weights and sizes, as ``read_vit_checkpoint`` returns them.
        layer: block whose output is used, counted from the last, which is 1.
        num_heads: attention heads; a divisor of the width.
        dtype: floating-point type of the transformer.
        path: the weights file, whose SHA-256 identifies the encoder.

    Attributes:
        width: E, the width of the features.
        depth: number of blocks of the checkpoint; those after the chosen one are not kept.
        layer, num_heads: as given.
        patch_size: side of a patch in pixels.
        image_sizes: the accepted heights (= widths) in pixels.
    """

    prefix: Tensor  # [1, P, E]
    mean: Tensor
    std: Tensor

    def __init__(self, checkpoint: VitCheckpoint, layer: int, num_heads: int, dtype: torch.dtype, path: Path | str):
        super().__init__()
        self.width, self.depth, self.patch_size = checkpoint.width, checkpoint.depth, checkpoint.patch_size
        self.layer, self.num_heads = layer, num_heads
        self._family = FAMILIES[checkpoint.layout]
        self._rotary = checkpoint.layout == "DINOv3"
        positions = "rotary" if self._rotary else f"{checkpoint.table}x{checkpoint.table}"
        self._architecture = (
            f"{checkpoint.layout} width {self.width} depth {self.depth} heads {num_heads} patch {self.patch_size} "
            f"registers {checkpoint.registers} positions {positions}"
        )
        self._file_hash = sha256(path)
        self._network_sizes = _network_sizes(checkpoint)
        self.image_sizes = tuple(sorted(self._network_sizes))
        # Extra tokens and positions are added here: timm would interpolate the table otherwise than published.
        kept_blocks = self.depth - layer + 1
        prefix = checkpoint.prefix
        block: Callable[..., nn.Module] = partial(RotaryBlock, prefix=prefix.shape[1]) if self._rotary else Block
        self.vit = VisionTransformer(
            img_size=self.image_sizes[0],
            patch_size=self.patch_size,
            embed_dim=self.width,
            depth=kept_blocks,
            num_heads=num_heads,
            # timm truncates width * mlp_ratio: the half keeps a rounded product from losing a unit.
            mlp_ratio=(checkpoint.hidden + 0.5) / self.width,
            mlp_layer=SwiGLUPacked if checkpoint.gated else Mlp,  # type: ignore[arg-type]  # a partial, as in timm
            act_layer=nn.SiLU if checkpoint.gated else self._family.activation,  # type: ignore[arg-type]
            norm_layer=partial(nn.LayerNorm, eps=self._family.eps),
            block_fn=block,  # type: ignore[arg-type]
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
        self.register_buffer("prefix", prefix.to(dtype), persistent=False)
        for grid in {size // self.patch_size for size in self._network_sizes.values()}:
            if self._rotary:
                periods = checkpoint.periods
                table = rotation(default_periods(self.width // num_heads) if periods is None else periods, grid)
            else:
                table = interpolate_positions(checkpoint.positions, grid, self._family.grid_offset)  # [1, G, E]
            self.register_buffer(f"positions_{grid}", table.to(dtype), persistent=False)
        self.register_buffer("mean", torch.tensor(self._family.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self._family.std).view(3, 1, 1), persistent=False)

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of the features of a square image of ``image_size`` pixels.

        Raises:
            UserError: the encoder takes no images of that size.
        """
        if image_size not in self._network_sizes:
            expected = " or ".join(map(str, self.image_sizes))
            raise UserError(f"image_size is {image_size} pixels, expected {expected} for this encoder")
        side = self._network_sizes[image_size] // self.patch_size
        return side, side

    def provenance(self) -> dict[str, Any]:
        """What the features depend on, JSON-able: weights file, architecture, layer and transform."""
        shrunk = [f"{size} scaled to {to}" for size, to in self._network_sizes.items() if size != to]
        return {
            "encoder_sha256": self._file_hash,
            "architecture": self._architecture,
            "layer": self.layer,
            "transform": ", ".join([self._family.transform, *shrunk]),
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
        return self.vit.norm(self._tokens(images)[:, self.prefix.shape[1] :])

    def class_token(self, images: Tensor) -> Tensor:
        """The class token [B, E] after the final LayerNorm, of the same images; SigLIP has none."""
        return self.vit.norm(self._tokens(images)[:, 0])

    def _tokens(self, images: Tensor) -> Tensor:
        """Class token, registers and patches [B, P + G, E]: the output of the last kept block."""
        images = self.preprocess(images)
        positions = getattr(self, f"positions_{images.shape[-1] // self.patch_size}")
        images = images.to(dtype=positions.dtype, memory_format=torch.channels_last)
        with without_tf32(images):
            patches = self.vit.patch_embed.proj(images).flatten(2).transpose(1, 2)  # [B, G, E]
            prefix = self.prefix.expand(len(images), -1, -1)
            if self._rotary:
                tokens = torch.cat([prefix, patches], 1)
                for block in self.vit.blocks:
                    tokens = block(tokens, positions)
                return tokens
            return self.vit.blocks(torch.cat([prefix, patches + positions], 1))

    def _check_size(self, height: int, width: int) -> None:
        if height != width or height not in self._network_sizes:
            expected = " or ".join(f"{size}x{size}" for size in self.image_sizes)
            raise UserError(f"images are {height}x{width}, expected {expected} for this encoder")


def load_encoder(
    weights: Path | str,
    layer: int = 3,
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load a frozen encoder from a published checkpoint of DINOv2, DINOv3, SigLIP, MAE, MoCo v3 or iBOT.

    Family, width, depth, patch size, position table and register count are read from the file. In float32 the features
    of DINOv2, MAE, MoCo v3 and iBOT are those of the published DiGIT code, which differ from the hub's DINOv2: the
    position table is scaled by (grid + 0.1) / table without antialiasing. Those of DINOv3 and SigLIP are transformers'.

    Args:
        weights: the checkpoint file, of ``torch.save`` or safetensors.
        layer: which block's output, counted from the end: 1 is the last, 3 the published choice. Later blocks are
            neither kept nor computed.
        num_heads: attention heads, which cannot be seen from most weights; default: those of the family's published
            model of that width, ``width // 64`` but for two of SigLIP, or as the rotary periods in Meta's files say.
        device: where to put it.
        dtype: of the transformer and its features.

    Raises:
        UserError: the file is no such checkpoint, or layer or heads do not fit it.
    """
    checkpoint = read_vit_checkpoint(weights)
    width, depth = checkpoint.width, checkpoint.depth
    if not 1 <= layer <= depth:
        raise UserError(f"layer is {layer}, expected 1 (the last block) to {depth} (the first) for {weights}")
    num_heads = _head_count(checkpoint, weights) if num_heads is None else num_heads
    if num_heads < 1 or width % num_heads:
        raise UserError(f"num_heads is {num_heads}, expected a divisor of the width {width} of {weights}")
    if checkpoint.layout == "DINOv3":
        channels = width // num_heads
        periods = channels // 4 if checkpoint.periods is None else len(checkpoint.periods)
        if channels != 4 * periods or not periods:
            expected = "a multiple of 4" if checkpoint.periods is None else f"{4 * periods} as by its rotary periods"
            raise UserError(f"{weights}: has {channels} channels in each of {num_heads} heads, expected {expected}")
    encoder = Encoder(checkpoint, layer, num_heads, dtype, weights)
    return encoder.to(device).eval().requires_grad_(False)


def interpolate_positions(table: Tensor, grid: int, offset: float = 0.1) -> Tensor:
    """Scale a position table [1, n * n, E] to [1, grid * grid, E] as the published code does (float32).

    Bicubic, no antialiasing, sampling step n / (grid + offset); an equal size is left untouched.
    """
    side, width = math.isqrt(table.shape[1]), table.shape[2]
    if side == grid:
        return table
    square = table.float().reshape(1, side, side, width).permute(0, 3, 1, 2)
    if offset:
        scale = (grid + offset) / side
        scaled = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    else:
        scaled = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return scaled.permute(0, 2, 3, 1).reshape(1, grid * grid, width)


def _network_sizes(checkpoint: VitCheckpoint) -> dict[int, int]:
    """Accepted image size -> size of the network's input.

    The native size is what the position table was made for; a table for more than 224 (DINOv2's is for 518) is
    scaled down to that, but for SigLIP, which is published for each size. 8/7 of the native size, 256 for 224, is
    published as shrunk to it with DINOv2, and so is SigLIP's where patches of 14 do not divide it; the other encoders,
    whose patches of 16 do, see it whole: a grid of 16x16 instead of 14x14. DINOv3, without a table, sees 256 alone.
    """
    layout, patch_size = checkpoint.layout, checkpoint.patch_size
    if layout == "DINOv3":
        return {_ROTARY_GRID * patch_size: _ROTARY_GRID * patch_size}
    native = checkpoint.table * patch_size
    if layout == "SigLIP" and native == 378:
        native = 384  # So400m of patch 14 leaves the last 6 rows and columns out
    elif layout != "SigLIP" and native > _NATIVE_SIZE and _NATIVE_SIZE % patch_size == 0:
        native = _NATIVE_SIZE
    sizes = {native: native}
    large, rest = divmod(native * 8, 7)
    if rest == 0 and (layout == "DINOv2" or (layout == "SigLIP" and large % patch_size)):
        sizes[large] = native
    elif rest == 0 and large % patch_size == 0:
        sizes[large] = large
    return sizes


def _head_count(checkpoint: VitCheckpoint, weights: Path | str) -> int:
    """Heads of the published model of that family and width."""
    width, known = checkpoint.width, FAMILIES[checkpoint.layout].heads
    if checkpoint.periods is not None and len(checkpoint.periods):
        return width // (4 * len(checkpoint.periods))
    if width not in known and width % 64:
        raise UserError(
            f"{weights}: its width {width} is not a multiple of 64, expected the head count as num_heads (--num-heads)"
        )
    return known.get(width, width // 64)


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
