"""MAGE's VQGAN as a trainable network, its parameters named as in the published checkpoint.

It differs from the taming-transformers original: no attention, convolutions without bias inside the blocks, average
pooling and nearest upsampling, one block fewer a level in the decoder, no ``quant_conv``, images in [0, 1].

Shapes: `B` images, `C` latent channels, `N` codes, `h`, `w` rows and columns of the latent grid.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit_ds.tokenizer.codebook import nearest

GROUPS = 32


class VqganNetwork(nn.Module):
    """Encoder, codebook and decoder of a VQGAN.

    Args:
        ddconfig: ``ch``, ``ch_mult``, ``num_res_blocks``, ``z_channels``, ``in_channels`` and ``out_ch`` of a
            taming-style configuration; its other keys have no influence here.
        codes: N.
    """

    def __init__(self, ddconfig: Mapping[str, Any], codes: int):
        super().__init__()
        self.downsampling = 2 ** (len(ddconfig["ch_mult"]) - 1)
        self.encoder = _Encoder(ddconfig)
        self.decoder = _Decoder(ddconfig)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, ddconfig["z_channels"])})

    @property
    def codebook(self) -> nn.Embedding:
        """The codes' vectors [N, C]."""
        return cast(nn.Embedding, self.quantize["embedding"])

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> latents [B, C, h, w], not yet quantised."""
        return self.encoder(images)

    def quantise(self, latents: Tensor) -> Tensor:
        """Nearest code of each latent: [B, C, h, w] -> int64 [B, h, w]; not differentiable."""
        return nearest(latents.permute(0, 2, 3, 1), self.codebook.weight)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, h, w] -> the codebook's rows [B, C, h, w]; differentiable for the codebook."""
        return self.codebook(codes).permute(0, 3, 1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Quantised latents [B, C, h, w] -> images [B, 3, H, W], about in [0, 1]."""
        return self.decoder(latents)


class _Block(nn.Module):
    """Two convolutions around a residual.

    Where the width changes, the published network adds a 1x1 convolution of the *result*, not of the input: the
    input is then not passed on at all.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result = self.conv1(F.silu(self.norm1(x)))
        result = self.conv2(F.silu(self.norm2(result)))
        return result + (self.nin_shortcut(result) if hasattr(self, "nin_shortcut") else x)


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = _Block(channels, channels)
        self.block_2 = _Block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class _Encoder(nn.Module):
    def __init__(self, ddconfig: Mapping[str, Any]):
        super().__init__()
        widths = [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]]
        self.conv_in = nn.Conv2d(ddconfig["in_channels"], ddconfig["ch"], 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            _level(channels, width, ddconfig["num_res_blocks"])
            for channels, width in zip([ddconfig["ch"], *widths], widths)
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], ddconfig["z_channels"], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        level: Any
        for index, level in enumerate(self.down):
            if index > 0:
                x = F.avg_pool2d(x, 2)
            for block in level["block"]:
                x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, ddconfig: Mapping[str, Any]):
        super().__init__()
        widths = [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]]
        self.conv_in = nn.Conv2d(ddconfig["z_channels"], widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        # up.0 is the finest level and runs last.
        self.up = nn.ModuleList(
            _level(channels, width, ddconfig["num_res_blocks"])
            for channels, width in zip([*widths[1:], widths[-1]], widths)
        )
        level: Any
        for level, width in zip(self.up[1:], widths[1:]):
            level["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], ddconfig["out_ch"], 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        level: Any
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


def _level(channels: int, width: int, blocks: int) -> nn.ModuleDict:
    residual = [_Block(channels if index == 0 else width, width) for index in range(blocks)]
    return nn.ModuleDict({"block": nn.ModuleList(residual)})


class _Norm(nn.GroupNorm):
    """Group normalisation; compiled, the statistics of each channel are taken and then joined to those of its group.

    The compiler lays activations out channels last for a GPU. There the few channels of a group lie apart from pixel to
    pixel, and a reduction over the group, as the compiler would write it, uses a small part of each line of memory that
    it fetches. The parts' means and variances make the whole's exactly (Chan et al. 1979, for parts of equal size).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (2, 3), correction=0)  # [B, C]
        between, group_mean = torch.var_mean(mean.unflatten(1, (GROUPS, -1)), 2, correction=0)  # [B, GROUPS]
        spread = torch.rsqrt(variance.unflatten(1, (GROUPS, -1)).mean(2) + between + self.eps)
        scale = self.weight * spread.repeat_interleave(self.num_channels // GROUPS, 1)
        shift = self.bias - group_mean.repeat_interleave(self.num_channels // GROUPS, 1) * scale
        return (wide * scale[..., None, None] + shift[..., None, None]).to(x.dtype)


def _norm(channels: int) -> nn.GroupNorm:
    return _Norm(GROUPS, channels, eps=1e-6)
