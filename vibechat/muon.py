"""Muon: momentum, orthogonalized. For the matrices of the blocks.

    m <- m + (1 - mu) (g - m)       u = g + mu (m - g)  (Nesterov)       w <- w - lr sqrt(max(1, rows / cols)) polar(u)

Parameters of one shape are stacked and orthogonalized together. Source: Jordan et al. 2024, "Muon: an optimizer for
hidden layers"; the polar factor by `vibechat.kernels.newton_schulz`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vibechat.common import compute_dtype
from vibechat.kernels import newton_schulz


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters; `state[p]` holds momentum_buffer, a view into its shape's stack.

    Set `found_inf` to a 0-d float32 tensor on the parameters' device, and step() changes nothing when it is nonzero,
    without the host ever looking.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        """
        Args:
            params: matrices; each distinct shape becomes one parameter group.
            lr: how far a step moves each singular direction, before the factor sqrt(max(1, rows / cols)).
            momentum: mu.
            nesterov: look ahead by one step of momentum.
            ns_steps: Newton-Schulz iterations.

        Raises:
            ValueError: for a parameter that is no matrix.
        """
        by_shape: dict[tuple[torch.Size, torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            if p.ndim != 2:
                raise ValueError(f"Muon: a parameter of shape {tuple(p.shape)} is no matrix; give it to AdamW")
            by_shape.setdefault((p.shape, p.device, p.dtype), []).append(p)
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__([{"params": group} for group in by_shape.values()], defaults)
        self.found_inf: Tensor | None = None
        self._momentum: list[Tensor] = []  # a stack (count, rows, cols) per group
        for group in self.param_groups:
            stack = torch.zeros((len(group["params"]), *group["params"][0].shape), device=group["params"][0].device)
            self._momentum.append(stack)
            for p, buffer in zip(group["params"], stack, strict=True):
                self.state[p] = {"momentum_buffer": buffer}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; in a group all have one or none has."""
        for group, momentum in zip(self.param_groups, self._momentum, strict=True):
            params = group["params"]
            grads = [p.grad for p in params if p.grad is not None]
            if not grads:
                continue
            if len(grads) != len(params):
                raise ValueError("Muon: some parameters of one shape have gradients and some do not")
            self._update(params, torch.stack(grads), momentum, group)

    def _update(self, params: list[Tensor], grad: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
        """Update parameters of one shape, given their stacked gradient (count, rows, cols), which is overwritten."""
        rows, cols = grad.shape[-2:]
        keep = 1.0 if self.found_inf is None else 1.0 - self.found_inf.clamp(max=1.0)
        if self.found_inf is not None:
            grad = torch.where(self.found_inf > 0, momentum, grad)  # a lerp towards itself changes nothing
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        polar = newton_schulz(update.to(compute_dtype(update.device)), group["ns_steps"])
        scale = group["lr"] * max(1.0, rows / cols) ** 0.5
        torch._foreach_add_(params, list((polar.to(params[0].dtype) * (-scale * keep)).unbind()))


class DistMuon(Muon):
    """Muon sharded between ranks; at one rank, which is all that there is so far, Muon itself."""
