"""Feature extractors for torch-fidelity: Inception, DINOv2 or a feature network, each from a local file."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from digit_ds.data.feature_network import load_feature_network
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.safe_load import load_torch
from digit_ds.tokenizer.encoder import load_encoder

INCEPTION = "inception-v3-compat"
DINOV2_SIZE = 224
"""Pixels to which torch-fidelity resizes pictures for DINOv2."""


class Extractor(NamedTuple):
    """A registered extractor and the arguments of torch-fidelity that go with it."""

    name: str
    arguments: dict[str, Any]
    """Keyword arguments of ``calculate_metrics``."""
    description: str
    """What to print beside the figures."""
    layers: dict[str, str]
    """Feature layer of each metric."""


def open_extractor(inception_weights: Path | str | None, features: Path | str | None) -> Extractor:
    """The Inception network of ``inception_weights``, or the feature network ``features`` in its place."""
    return inception(inception_weights) if features is None else feature_network(features)


def inception(weights: Path | str | None) -> Extractor:
    """torch-fidelity's port of the TensorFlow Inception network, from a local copy of its weights.

    Raises:
        UserError: no file was given, or it is none of such weights; nothing is ever downloaded.
    """
    if weights is None or not Path(weights).is_file():
        raise UserError(
            f"Inception weights: {'no file was given' if weights is None else f'{weights} does not exist'}, expected a "
            "local copy of weights-inception-2015-12-05-6726825d.pth of torch-fidelity (--inception-weights), or a "
            "feature network (--features)"
        )
    try:  # torch-fidelity itself would run whatever code the file contains
        load_torch(weights)
    except UserError as error:
        raise UserError(
            f"{weights}: holds objects other than tensors, expected torch-fidelity's Inception weights"
        ) from error
    layers = {"fid": "2048", "prc": "2048", "isc": "logits_unbiased"}
    arguments = {"feature_extractor": INCEPTION, "feature_extractor_weights_path": str(weights)}
    return Extractor(f"{INCEPTION}-{sha256(weights)[:12]}", arguments, f"Inception v3 ({weights})", layers)


def feature_network(path: Path | str) -> Extractor:
    """Register a feature network (``digit_ds.data.feature_network``) as extractor, named after its content."""
    network = load_feature_network(path)
    name = f"feature-network-{sha256(path)[:12]}"

    class FeatureNetworkExtractor(FeatureExtractorBase):
        """Features and logits of one feature network."""

        def __init__(self, name: str, features_list: list[str], **_: Any):
            super().__init__(name, features_list)
            self.network = network

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, network.side, network.side, dtype=torch.uint8)

        def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
            features, logits = self.network(pictures)
            found = {"features": features, "logits": logits}
            return tuple(found[layer] for layer in self.features_list)

    FEATURE_EXTRACTORS_REGISTRY.pop(name, None)
    register_feature_extractor(name, FeatureNetworkExtractor)
    layers = {"fid": "features", "prc": "features", "isc": "logits"}
    return Extractor(name, {"feature_extractor": name}, f"feature network {path} ({name}), not Inception", layers)


def dinov2(weights: Path | str) -> Extractor:
    """Register DINOv2 as extractor: the class token after the last LayerNorm, whose Fréchet distance is FDD.

    Pictures are prepared as by torch-fidelity's extractor of the same network (bilinear to 224 pixels, ImageNet's mean
    and deviation), which downloads its weights and takes no file. Published figures are of ViT-L/14 without registers
    (Stein et al., arXiv 2306.04675).

    Raises:
        UserError: the file is missing or holds no DINOv2; nothing is ever downloaded.
    """
    if not Path(weights).is_file():
        raise UserError(
            f"DINOv2 weights: {weights} does not exist, expected a local copy of dinov2_vitl14_pretrain.pth (Meta's)"
        )
    encoder = load_encoder(weights, layer=1)
    architecture = encoder.provenance()["architecture"]
    if not architecture.startswith("DINOv2") or DINOV2_SIZE not in encoder.image_sizes:
        sizes = " or ".join(map(str, encoder.image_sizes))
        raise UserError(
            f"{weights}: holds {architecture} for images of {sizes} pixels, expected DINOv2 for {DINOV2_SIZE}"
        )
    name = f"dinov2-{sha256(weights)[:12]}"

    class ClassTokenExtractor(FeatureExtractorBase):
        """The class token of one DINOv2."""

        def __init__(self, name: str, features_list: list[str], **_: Any):
            super().__init__(name, features_list)
            self.encoder = encoder

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("class_token",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "class_token"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, DINOV2_SIZE, DINOV2_SIZE, dtype=torch.uint8)

        def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
            size = (DINOV2_SIZE, DINOV2_SIZE)
            resized = interpolate_bilinear_2d_like_tensorflow1x(pictures.float(), size=size, align_corners=False)
            return (self.encoder.class_token(resized / 255),)

    FEATURE_EXTRACTORS_REGISTRY.pop(name, None)
    register_feature_extractor(name, ClassTokenExtractor)
    described = f"{architecture} ({weights}), class token"
    return Extractor(name, {"feature_extractor": name}, described, {"fid": "class_token"})
