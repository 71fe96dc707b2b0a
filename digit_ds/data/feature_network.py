"""A small classifier in a file, whose features and class probabilities replace Inception's for images unlike
ImageNet's.

The format is a safetensors file of a feed-forward network with ReLU between its layers:

```
mean, scale           float [I]       input i is (x_i - mean_i) / scale_i
layers.{n}.weight     float [out, in] n = 0 .. L - 1
layers.{n}.bias       float [out]     the last layer gives the logits, what enters it are the features
metadata              {"format": "feature-network-1", "side": "8", "channels": "1"}, I = channels * side * side;
                      perhaps "classes", a JSON list of the names of the logits in their order
```

A picture's input are its values in [0, 1]: channels averaged to one if ``channels`` is 1, then scaled to ``side`` x
``side``
(area averages), channel by channel, row by row. scikit-learn's ``MLPClassifier`` fits without loss:
``weights = [w.T for w in mlp.coefs_]``, ``biases = mlp.intercepts_``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from digit_ds.errors import UserError
from digit_ds.files import write_atomically

FORMAT = "feature-network-1"


class FeatureNetwork(nn.Module):
    """The network of such a file."""

    mean: Tensor
    scale: Tensor

    def __init__(
        self, side: int, channels: int, weights: Sequence[Tensor], biases: Sequence[Tensor], mean: Tensor, scale: Tensor
    ):
        super().__init__()
        self.side, self.channels = side, channels
        self.class_names: list[str] | None = None
        self.layers = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights)
        for layer, weight, bias in zip(self.layers, weights, biases):
            layer.weight.data, layer.bias.data = weight.float(), bias.float()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())

    @property
    def classes(self) -> int:
        """Number of classes."""
        return cast(nn.Linear, self.layers[-1]).out_features

    def inputs(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, H, W] -> what the first layer is given, float32 [B, I]."""
        values = pictures.float() / 255
        if self.channels == 1:
            values = values.mean(1, keepdim=True)
        values = functional.interpolate(values, size=(self.side, self.side), mode="area").flatten(1)
        return (values - self.mean) / self.scale

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [B, 3, H, W] -> features [B, F] and logits [B, classes]."""
        hidden = self.inputs(pictures)
        for layer in self.layers[:-1]:
            hidden = functional.relu(layer(hidden))
        return hidden, self.layers[-1](hidden)


def save_feature_network(
    path: Path | str,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    side: int,
    channels: int = 1,
    mean: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    classes: Sequence[str] | None = None,
) -> None:
    """Write the file; ``weights`` are [out, in], ``mean`` and ``scale`` numbers or one for each input, ``classes`` the
    names of the logits.
    """
    width = channels * side * side
    tensors = {"mean": torch.zeros(width) + mean, "scale": torch.zeros(width) + scale}
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tensors[f"layers.{number}.weight"] = torch.as_tensor(weight).float().contiguous()
        tensors[f"layers.{number}.bias"] = torch.as_tensor(bias).float().contiguous()
    metadata = {"format": FORMAT, "side": str(side), "channels": str(channels)}
    metadata |= {} if classes is None else {"classes": json.dumps(list(classes))}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_feature_network(path: Path | str) -> FeatureNetwork:
    """Read the file.

    Raises:
        UserError: it is missing, damaged, or not of this format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a feature network (.safetensors)") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
    count = sum(name.endswith(".weight") for name in tensors)
    try:
        side, channels = int(metadata["side"]), int(metadata["channels"])
        weights = [tensors[f"layers.{number}.weight"] for number in range(count)]
        biases = [tensors[f"layers.{number}.bias"] for number in range(count)]
        mean, scale = tensors["mean"], tensors["scale"]
        names = json.loads(metadata.get("classes", "null"))
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error} is missing or wrong, expected a complete feature network") from error
    widths = [channels * side * side, *(weight.shape[0] for weight in weights)]
    fits = all(w.shape[1:] == (n,) and b.shape == w.shape[:1] for w, b, n in zip(weights, biases, widths))
    if not weights or not fits or mean.shape != (widths[0],) or scale.shape != (widths[0],) or channels not in (1, 3):
        raise UserError(
            f"{path}: holds tensors of wrong shapes, expected layers for {channels} x {side} x {side} inputs"
        )
    network = FeatureNetwork(side, channels, weights, biases, mean, scale).eval().requires_grad_(False)
    if names is not None and (not isinstance(names, list) or len(names) != network.classes):
        raise UserError(f"{path}: has wrong class names, expected a list of {network.classes}, one for each logit")
    network.class_names = names and [str(name) for name in names]
    return network
