"""Images <-> VQ tokens: a frozen VQGAN from MAGE's published checkpoint, or of another size with its configuration.

Shapes: `B` images, `G` latent positions, `N` codes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.safe_load import load_strictly, load_torch
from digit_ds.tokenizer.precision import without_tf32
from digit_ds.tokenizer.vqgan_network import GROUPS, VqganNetwork

MAGE_CONFIG: Mapping[str, Any] = {
    "n_embed": 1024,
    "ddconfig": {
        "z_channels": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
    },
}
_TRAINING_ONLY = ("loss.", "discriminator.")


class Vqgan(nn.Module):
    """A frozen VQGAN.

    Attributes:
        codes: N. downsampling: pixels a latent position stands for, along each side. sha256: of the checkpoint file.
    """

    def __init__(self, network: VqganNetwork, file_hash: str):
        super().__init__()
        self.network = network
        self.codes = network.codebook.num_embeddings
        self.downsampling = network.downsampling
        self.sha256 = file_hash

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """VQ tokens int64 [B, G], row by row, 0..N-1, of images [B, 3, H, W] in [0, 1].

        Raises:
            UserError: the images are not floating point, or height or width is no multiple of ``downsampling``.
        """
        if not images.is_floating_point():
            raise UserError(f"images are {images.dtype}, expected floating point in [0, 1]")
        height, width = images.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise UserError(f"images are {height}x{width}, expected multiples of {self.downsampling} for this VQGAN")
        images = images.to(self.network.encoder.conv_in.weight.dtype)
        with without_tf32(images):
            return self.network.quantise(self.network.encode(images)).flatten(1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W], about in [0, 1], of ids int64 [B, rows, columns] or [B, G] of a square grid.

        Raises:
            UserError: [B, G] ids are not a square number of them.
        """
        if ids.ndim == 2:
            side = math.isqrt(ids.shape[1])
            if side * side != ids.shape[1]:
                raise UserError(
                    f"{ids.shape[1]} VQ tokens do not form a square grid, expected them as [B, rows, columns]"
                )
            ids = ids.view(-1, side, side)
        latents = self.network.embed(ids)
        with without_tf32(latents):
            return self.network.decode(latents).float()

    def compile_decoder(self) -> None:
        """Compile what :meth:`decode` runs for the first batch's shape; another shape compiles again.

        Normalisation and activation become one kernel each, in the channels-last layout in which a GPU computes
        half-precision convolutions; run one by one they convert between layouts.
        """
        self.network.decoder.to(memory_format=torch.channels_last).compile(dynamic=False)

    def provenance(self) -> dict[str, Any]:
        """What the tokens depend on, JSON-able."""
        return {"vqgan_sha256": self.sha256}


def load_vqgan(
    checkpoint: Path | str,
    config: Mapping[str, Any] | Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Vqgan:
    """Load a frozen VQGAN from a checkpoint with or without a ``state_dict`` wrapper.

    Args:
        checkpoint: the file. Keys of the training loss and its discriminator are passed over, all others must fit.
        config: a taming-style dict (``embed_dim``, ``n_embed``, ``ddconfig``, as they are or inside
            ``model.params``), a YAML file of that form, or None: the YAML file beside the checkpoint that has its name
            (``vqgan.yaml`` of ``vqgan.ckpt``), or MAGE's where there is none.
        device: where to put it.
        dtype: of the network. Codes are compared in float32 whatever it is, and float32 means no TF32 on a GPU.

    Raises:
        UserError: checkpoint or configuration cannot be used, or they disagree.
    """
    if config is None and (beside := Path(checkpoint).with_suffix(".yaml")).is_file():
        config = beside
    parameters, config_name = _read_config(config)
    content = load_torch(checkpoint)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {
        name: value.to(dtype, copy=True)
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(value, Tensor) and not name.startswith(_TRAINING_ONLY)
    }
    with torch.device("meta"):
        network = VqganNetwork(parameters["ddconfig"], parameters["n_embed"])
    try:
        load_strictly(network, state, f"{checkpoint}, read with {config_name}")
    except UserError as error:
        if config is not None:
            raise
        raise UserError(f"{error}; a VQGAN other than MAGE's needs its configuration (--vqgan-config)") from error
    vqgan = Vqgan(network, sha256(checkpoint))
    return vqgan.to(device).eval().requires_grad_(False)


def to_uint8(images: Tensor) -> Tensor:
    """Pixels as the published code stores them: 255 x, clipped to 0..255 and truncated; same shape, uint8."""
    return images.float().mul(255).clamp(0, 255).to(torch.uint8)


def _read_config(config: Mapping[str, Any] | Path | str | None) -> tuple[Mapping[str, Any], str]:
    """``n_embed`` and ``ddconfig``, checked as far as the network needs them, and the configuration's name."""
    if config is None:
        return MAGE_CONFIG, "MAGE's configuration"
    source = "the given VQGAN configuration"
    if not isinstance(config, Mapping):
        source, config = f"{config}", _read_yaml(Path(config))
    for wrapper in ("model", "params"):
        if isinstance(config, Mapping) and isinstance(config.get(wrapper), Mapping):
            config = config[wrapper]
    if not isinstance(config, Mapping) or not isinstance(config.get("ddconfig"), Mapping):
        raise UserError(f"{source}: has no section ddconfig, expected a taming-style VQGAN configuration")
    ddconfig = {"in_channels": 3, "out_ch": 3, **config["ddconfig"]}
    numbers = {"n_embed": config.get("n_embed"), "embed_dim": config.get("embed_dim", ddconfig.get("z_channels"))}
    numbers |= {key: ddconfig.get(key) for key in ("z_channels", "in_channels", "out_ch", "ch", "num_res_blocks")}
    factors = ddconfig.get("ch_mult")
    for key, value in numbers.items():
        if not _is_count(value):
            raise UserError(f"{source}: {key} is {value!r}, expected a positive whole number")
    if not isinstance(factors, list | tuple) or not factors or not all(_is_count(factor) for factor in factors):
        raise UserError(f"{source}: ch_mult is {factors!r}, expected a list of positive whole numbers")
    if ddconfig["ch"] % GROUPS:
        raise UserError(f"{source}: ch is {ddconfig['ch']}, expected a multiple of the {GROUPS} normalisation groups")
    if numbers["embed_dim"] != ddconfig["z_channels"]:
        raise UserError(
            f"{source}: embed_dim is {numbers['embed_dim']}, expected {ddconfig['z_channels']}, its z_channels, since "
            "MAGE's VQGAN has no quant_conv between them"
        )
    return {"n_embed": numbers["n_embed"], "ddconfig": ddconfig}, source


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a VQGAN configuration") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML, expected a VQGAN configuration") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
