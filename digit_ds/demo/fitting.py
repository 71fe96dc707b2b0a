"""The small training loop of the two stand-ins: AdamW and Muon, warm-up and cosine, continues after an interruption."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit_ds.files import write_atomically
from digit_ds.parallel.progress import progress

WARMUP_STEPS = 20
SAVE_EVERY = 50
MUON_RATE = 0.03


def fit(
    module: nn.Module,
    loss: Callable[[float], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    unfinished: Path,
    description: str,
    matrices: Sequence[nn.Parameter] = (),
) -> None:
    """Minimise ``loss(share of the steps done)`` over the parameters of ``module``.

    Muon (https://kellerjordan.github.io/posts/muon) updates ``matrices``, hidden weights of a transformer or kernels of
    convolutions, AdamW the other parameters: with it both networks need about half the steps.

    The state lies in the file ``unfinished`` meanwhile; the caller removes it once the result is saved. Randomness
    comes from torch's global generator, which is saved too: an interrupted run ends with the weights of a whole one.
    """
    others = [parameter for parameter in module.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    ]
    if matrices:
        optimizers.append(Muon(matrices, MUON_RATE, momentum=0.9, weight_decay=0.01))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start = 0
    if unfinished.exists():
        saved = torch.load(unfinished, weights_only=True)
        if saved["steps"] == steps:
            start = saved["step"]
            module.load_state_dict(saved["module"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            torch.set_rng_state(saved["random"])

    with progress(total=steps, initial=start, description=description, unit="step") as bar:
        for step in range(start, steps):
            share = step / steps
            factor = min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * share))
            value = loss(share)
            module.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
                optimizer.step()
            bar.update(1)
            if (step + 1) % SAVE_EVERY == 0:
                bar.set_postfix(loss=f"{value.item():.3f}")
                state = {
                    "steps": steps,
                    "step": step + 1,
                    "module": module.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "random": torch.get_rng_state(),
                }
                write_atomically(unfinished, partial(torch.save, state))


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices, and for kernels of convolutions as [out, in * height * width].

    torch.optim.Muon computes in bfloat16, which took more than half of a training step on CPUs without instructions for
    it, and takes no kernels.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update all matrices."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["average"] = torch.zeros_like(matrix)
                average = state["average"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(average, group["momentum"]).flatten(1))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                matrix.sub_(rate * update.view_as(matrix))


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix [M, N] with its singular values moved near 1: five Newton-Schulz steps with Muon's coefficients."""
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), found, beta=3.4445)
    return found.T if tall else found


def draw(images: Tensor, count: int) -> Tensor:
    """``count`` random images of ``images``."""
    return images[torch.randint(len(images), (count,))]


def distort(images: Tensor, turn: float, stretch: float, move: float) -> Tensor:
    """Turn images by at most ``turn`` radians, stretch and slant them by that share, move them by ``move`` pixels."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images)) * 2 - 1) * limit

    angle, slant = uniform(turn), uniform(stretch)
    shift = 2 * move / images.shape[-1]  # affine_grid's coordinates run from -1 to 1
    rows = [
        torch.stack([angle.cos() * (1 + uniform(stretch)), slant - angle.sin(), uniform(shift)], 1),
        torch.stack([angle.sin(), angle.cos() * (1 + uniform(stretch)), uniform(shift)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
