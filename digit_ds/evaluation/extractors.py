"""Feature extractors for torch-fidelity: Inception from a local file, or a feature network from one."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from digit_ds.data.feature_network import load_feature_network
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.safe_load import load_torch

INCEPTION = "inception-v3-compat"


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
            "local copy of weights-inception-2015-12-05-6726825d.pth (torch-fidelity's), or a feature network instead"
        )
    try:  # torch-fidelity itself would run whatever code the file contains
        load_torch(weights)
    except UserError as error:
        raise UserError(
            f"{weights}: is no file of tensors alone, expected torch-fidelity's Inception weights"
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
