"""AdamW that clips by a given norm, skips a non-finite update and keeps a moving average, all on the device."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW under DeepSpeed, which hands it flat float32 partitions of the weights.

    ``global_norm`` must return the gradient norm of the whole model, negative, infinite or NaN where it is not finite.
    Clipping and the decision to skip go into the fused kernel as a divisor and a flag (the protocol of PyTorch's
    GradScaler), so that neither costs a pass over the gradients or makes the host wait for the device. A skipped
    update changes neither weights nor moments nor Adam's own step count.

    The optional moving average of the weights is one more state tensor (``average``) beside the two moments: it is
    partitioned, saved and reshaped as they are.
    """

    def __init__(
        self,
        parameters,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        clipping: float,
        average_decay: float,
    ) -> None:
        super().__init__(parameters, learning_rate, betas, epsilon, weight_decay, fused=True)
        self.clipping = clipping
        self.average_decay = average_decay
        self.global_norm: Callable[[], Tensor | float] = self.own_norm
        self.last_norm: Tensor | float = 0.0
        self._judged: object = None

    @property
    def state_names(self) -> list[str]:
        """State tensors of the size of the weights."""
        return ["exp_avg", "exp_avg_sq", *(["average"] if self.average_decay else [])]

    def create_state(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Make the state tensors of ``parameters`` (None: all) before the first step, to load a checkpoint into."""
        for parameter in parameters or [p for group in self.param_groups for p in group["params"]]:
            self._state_of(parameter)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if self.average_decay:
                state["average"] = parameter.detach().clone()
        return state

    def own_norm(self) -> Tensor:
        """Norm over the gradients of this optimizer: the whole model's for one process without ZeRO."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    @torch.no_grad()
    def step(self, closure=None):
        """One update of the current parameter groups; DeepSpeed calls it once for each of its partitions."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return None
        for parameter in parameters:
            self._state_of(parameter)
        norm = self.global_norm()
        self.last_norm = norm
        if norm is not self._judged:  # the partitions of a step have one norm
            self._judged = norm
            self._judge(torch.as_tensor(norm, dtype=torch.float32).to(parameters[0].device, non_blocking=True))
        super().step()
        if self.average_decay:
            averages = [self.state[parameter]["average"] for parameter in parameters]
            # A skipped update leaves finite weights behind, so the average may move towards them all the same.
            torch._foreach_lerp_(averages, parameters, 1.0 - self.average_decay)
        return None

    def _judge(self, norm: Tensor) -> None:
        """What the fused kernel divides gradients by, and whether it skips the update."""
        finite = torch.isfinite(norm) & (norm >= 0)
        self.found_inf = (~finite).to(torch.float32)
        # As torch.nn.utils.clip_grad_norm_: the gradient times clipping / (norm + 1e-6) where that is below 1.
        self.grad_scale = ((norm + 1e-6) / self.clipping).clamp(min=1.0) if self.clipping else None
