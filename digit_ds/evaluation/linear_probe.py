"""``digit-ds probe``: how much of an image's class a linear layer reads from each layer of a frozen prior.

Shapes: ``N`` samples, ``B`` batch, ``G`` tokens of an image, ``L`` layers, ``R`` learning rates, ``D`` width, ``C``
classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from digit_ds.data.shards import iterate, read_manifest
from digit_ds.errors import UserError
from digit_ds.evaluation.settings import ProbeSettings
from digit_ds.files import read_json, sha256, write_atomically, write_json
from digit_ds.identity import DISCRIMINATIVE, VQ, Part, check_agreement, check_classes
from digit_ds.model.released import WEIGHTS, read_config
from digit_ds.model.sequences import start_tokens
from digit_ds.model.transformer import Transformer, load_model
from digit_ds.parallel import launch
from digit_ds.parallel.decide import agree, from_main, together
from digit_ds.parallel.progress import progress
from digit_ds.workdir import WorkDirectory, is_begun

MOMENTUM = 0.9
CACHE_BYTES = 4 << 30
"""Features of all samples are kept when they fit in this; otherwise the prior runs again in every pass."""


def probe(settings: ProbeSettings) -> dict[str, Any]:
    """Train one linear classifier per layer and learning rate, all in one go, and write ``probe.json`` and
    ``probe.png``.

    The classifiers see the mean over all 1 + G positions of the hidden state that *enters* a layer (index 0: the
    embeddings), as published. A class-conditional prior is started with BOS, never with the class token that would
    give the answer away. SGD with momentum 0.9, cosine learning rate, no weight decay, no label smoothing.
    Data-parallel under any launcher; the batches are the same for every number of processes.

    Returns:
        What ``probe.json`` holds: ``layers`` (``layer``, ``accuracy``, ``learning_rate``, ``by_learning_rate``),
        ``best_layer``, ``best_accuracy`` and the settings.

    Raises:
        UserError: model and shards do not belong together, or an argument cannot be.
    """
    launch.initialize()
    with together():
        device = launch.device()
        spec, provenance, _ = read_config(Path(settings.model))
        if spec.kind not in ("prior", "vq"):
            raise UserError(f"{settings.model}: has kind {spec.kind}, expected prior or vq to probe")
        manifests = [read_manifest(settings.train), read_manifest(settings.val)]
        made_of = VQ if spec.kind == "vq" else DISCRIMINATIVE
        shards = [manifest.part(path) for path, manifest in zip((settings.train, settings.val), manifests)]
        check_agreement([Part(f"model {settings.model}", provenance), *shards], made_of)
        check_classes(shards)
        record = settings.record() | {
            "model": sha256(Path(settings.model) / WEIGHTS),
            "train": manifests[0].index_sha256,
            "val": manifests[1].index_sha256,
        }
    record = agree(record, f"{settings.out}, its settings")
    target = Path(settings.out) / "probe.json"
    with WorkDirectory(settings.out, lambda: _complete(target, record), bool) as directory:
        if found := directory.found:
            if launch.is_main():
                best = f"best layer {found['best_layer']}, accuracy {found['best_accuracy']:.4f}"
                print(f"{target}: complete already, {best}")
            return found
        with together():
            model = load_model(settings.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
            tokens = [_read(shards, spec.kind) for shards in (settings.train, settings.val)]
        train, val = (_Features(model, *part, settings.batch) for part in tokens)
        classifiers = Classifiers(spec.layers, spec.width, len(manifests[0].classes), settings.learning_rates, device)
        _fit(classifiers, train, settings.passes, settings.batch, settings.seed)
        accuracy = _accuracy(classifiers, val, settings.batch)  # [R, L]
        result = {
            "settings": record,
            "model": str(settings.model),
            "train_samples": len(train.labels),
            "val_samples": len(val.labels),
            **_table(accuracy, settings.learning_rates),
        }
        from_main(lambda: _write(target, result))
        return result


def _complete(target: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What ``probe.json`` holds if it is of these settings; None: there is none. The folder may hold other files."""
    if not target.exists():
        return None
    found = read_json(target)
    is_begun(target, found.get("settings", {}), settings, another="holds a probe")
    return found


def _write(target: Path, result: dict[str, Any]) -> None:
    write_atomically(target.with_name("probe.png"), lambda temporary: _plot(result, temporary))
    write_json(target, result)
    print(f"{target}: best layer {result['best_layer']}, accuracy {result['best_accuracy']:.4f}")


class Classifiers:
    """R x L linear classifiers, each with its own loss and learning rate; their gradients are written out."""

    def __init__(
        self, layers: int, width: int, classes: int, learning_rates: Sequence[float], device: torch.device | str
    ):
        rates = len(learning_rates)
        self.rates = torch.tensor(learning_rates, device=device).view(rates, 1, 1, 1)
        self.weight = torch.zeros(rates, layers, width, classes, device=device)
        self.bias = torch.zeros(rates, layers, 1, classes, device=device)
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def logits(self, features: Tensor) -> Tensor:
        """Features [L, B, D] -> logits [R, L, B, C]."""
        return features @ self.weight + self.bias

    def step(self, features: Tensor, labels: Tensor, factor: float, total: int) -> None:
        """One SGD step on cross entropy.

        ``features`` [L, B, D] and ``labels`` [B] are this process's part of ``total`` samples; ``factor`` scales the
        rates.
        """
        error = self.logits(features).softmax(-1)  # [R, L, B, C]
        error[:, :, torch.arange(len(labels), device=labels.device), labels] -= 1
        error /= total
        gradients = [features.transpose(1, 2) @ error, error.sum(2, keepdim=True)]
        for parameter, velocity, gradient in zip((self.weight, self.bias), self.velocity, gradients):
            if dist.is_initialized():
                dist.all_reduce(gradient)
            velocity.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(self.rates * factor * velocity)


class _Features:
    """Pooled hidden states of samples, computed on demand or, where they fit, once."""

    def __init__(self, model: Transformer, codes: Tensor, labels: Tensor, batch: int):
        self.model, self.codes, self.labels, self.batch = model, codes, labels, batch
        self.device = next(model.parameters()).device
        self._cache: Tensor | None = None
        if 4 * len(codes) * model.spec.layers * model.spec.width <= CACHE_BYTES:
            indices = torch.arange(len(codes)).split(batch)
            with progress(total=len(codes), description="features", unit="samples") as bar:
                parts = []
                for part in indices:
                    parts.append(pooled_states(self.model, self.codes[part].to(self.device)))
                    bar.update(len(part))
            self._cache = torch.cat(parts, dim=1)

    def __call__(self, indices: Tensor) -> Tensor:
        """int64 [B] -> float32 [L, B, D]."""
        if self._cache is not None:
            return self._cache[:, indices.to(self.device)]
        return pooled_states(self.model, self.codes[indices].to(self.device))


@torch.inference_mode()
def pooled_states(model: Transformer, codes: Tensor) -> Tensor:
    """Mean over all positions, that of BOS included, of what enters each layer: codes [B, G] -> float32 [L, B, D]."""
    start = start_tokens(model.spec, None, len(codes), device=codes.device)[:, None]
    tokens = torch.cat([start, model.spec.vocabulary.token(codes)], dim=1)
    return torch.stack([state.float().mean(1) for state in model.hidden_states(tokens)[:-1]])


def _fit(classifiers: Classifiers, train: _Features, passes: int, batch: int, seed: int) -> None:
    """Cosine SGD; each process computes its share of every batch."""
    count = len(train.labels)
    batch = min(batch, count)
    per_pass = count // batch
    generator = torch.Generator().manual_seed(seed)
    with progress(total=passes * per_pass, description="probes", unit="steps") as bar:
        for number in range(passes):
            order = torch.randperm(count, generator=generator)
            for step in range(per_pass):
                own = order[step * batch : (step + 1) * batch][launch.rank() :: launch.world_size()]
                factor = (1 + math.cos(math.pi * (number * per_pass + step) / (passes * per_pass))) / 2
                classifiers.step(train(own), train.labels[own].to(train.device), factor, batch)
                bar.update(1)


def _accuracy(classifiers: Classifiers, val: _Features, batch: int) -> Tensor:
    """Top-1 accuracy [R, L]."""
    right = torch.zeros(classifiers.weight.shape[:2], device=val.device, dtype=torch.float64)
    for indices in torch.arange(len(val.labels))[launch.rank() :: launch.world_size()].split(batch):
        chosen = classifiers.logits(val(indices)).argmax(-1)  # [R, L, B]
        right += (chosen == val.labels[indices].to(val.device)).sum(-1)
    if dist.is_initialized():
        dist.all_reduce(right)
    return (right / len(val.labels)).cpu()


def _table(accuracy: Tensor, learning_rates: Sequence[float]) -> dict[str, Any]:
    """Accuracies [R, L] as a table of layers, and the best of them."""
    layers: list[dict[str, Any]] = []
    for layer in range(accuracy.shape[1]):
        chosen = int(accuracy[:, layer].argmax())
        by_rate = {str(rate): float(value) for rate, value in zip(learning_rates, accuracy[:, layer])}
        layers.append(
            {
                "layer": layer,
                "accuracy": float(accuracy[chosen, layer]),
                "learning_rate": learning_rates[chosen],
                "by_learning_rate": by_rate,
            }
        )
    best = max(layers, key=lambda row: row["accuracy"])
    return {"layers": layers, "best_layer": best["layer"], "best_accuracy": best["accuracy"]}


def _read(shards: Path | str, kind: str) -> tuple[Tensor, Tensor]:
    """All codes int64 [N, G] (as uint16 in memory they would need a copy a batch) and labels int64 [N]."""
    column = "vq" if kind == "vq" else "discriminative"
    codes, labels = [], []
    for sample in iterate(shards):
        codes.append(sample[column])
        labels.append(sample["label"])
    if min(labels, default=-1) < 0:
        raise UserError(f"{shards}: has samples without a label, expected labelled shards to probe with")
    return torch.from_numpy(np.stack(codes).astype(np.int32)), torch.tensor(labels)


def _plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy over layers, the best learning rate of each in bold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = [row["layer"] for row in result["layers"]]
    for rate in result["layers"][0]["by_learning_rate"]:
        values = [row["by_learning_rate"][rate] for row in result["layers"]]
        axes.plot(layers, values, linewidth=1, alpha=0.6, label=f"learning rate {rate}")
    axes.plot(layers, [row["accuracy"] for row in result["layers"]], "ko-", label="best")
    axes.set(xlabel="layer (0: embeddings)", ylabel="validation accuracy", title="Linear probe")
    axes.set_xticks(layers)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
