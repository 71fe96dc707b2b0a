"""Properties of each family of vision transformers that its files do not state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn


@dataclass(frozen=True)
class Family:
    """Normalisation of the images and the choices inside the network."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    transform: str = "ImageNet mean and deviation"  # how the identity of features calls the two
    eps: float = 1e-6  # of each LayerNorm
    activation: Callable[[], nn.Module] = nn.GELU  # of an MLP that is not gated
    grid_offset: float = 0.1  # see ``interpolate_positions``; that of the published DiGIT code
    heads: Mapping[int, int] = field(default_factory=dict)  # by width, where that is not width / 64


FAMILIES = {
    "DINOv2": Family(),
    "MAE": Family(),
    "MoCo v3": Family(),
    "iBOT": Family(),
    # facebookresearch/dinov3, hub/backbones.py: norm_layer="layernormbf16"
    "DINOv3": Family(eps=1e-5),
    # SigLIP and SigLIP 2: google-research/big_vision; So400m and giant-opt have heads of 72 and 96 channels.
    "SigLIP": Family(
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        transform="mean and deviation 0.5",
        activation=partial(nn.GELU, approximate="tanh"),
        grid_offset=0.0,
        heads={1152: 16, 1536: 16},
    ),
}
"""By the layout that ``read_vit_checkpoint`` found."""
