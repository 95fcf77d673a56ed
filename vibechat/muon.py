"""Muon: momentum, orthogonalized. For the matrices of the blocks.

    m <- m + (1 - mu) (g - m)       u = g + mu (m - g)  (Nesterov)       w <- w - lr sqrt(max(1, rows / cols)) polar(u)

Parameters of one shape are stacked and orthogonalized together. Source: Jordan et al. 2024, "Muon: an optimizer for
hidden layers"; the polar factor as in `vibechat.kernels.newton_schulz`, the rest as in `vibechat.kernels.muon_passes`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vibechat.common import compute_dtype
from vibechat.kernels.muon_passes import momentum_pass, update_pass
from vibechat.kernels.newton_schulz import orthogonalize


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters; `state[p]` holds momentum_buffer, a view into its shape's stack, and with `normuon`
    second_moment, (rows, 1), another.

    Set `found_inf` to a 0-d float32 tensor on the parameters' device, and step() changes nothing when it is nonzero,
    without the host ever waiting for a GPU to look.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        *,
        weight_decay: float = 0.0,
        normuon: bool = False,
        beta2: float = 0.95,
    ) -> None:
        """
        Args:
            params: matrices; each distinct shape becomes one parameter group.
            lr: how far a step moves each singular direction, before the factor sqrt(max(1, rows / cols)).
            momentum: mu.
            nesterov: look ahead by one step of momentum.
            ns_steps: Newton-Schulz iterations.
            weight_decay: times lr, what a step takes away of a weight; only where the step makes it smaller anyway.
            normuon: give every row of the update the same running size.
            beta2: decay of the rows' running size.

        Raises:
            ValueError: for a parameter that is no matrix.
        """
        by_shape: dict[tuple[torch.Size, torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            if p.ndim != 2:
                raise ValueError(f"Muon: a parameter of shape {tuple(p.shape)} is no matrix; give it to AdamW")
            by_shape.setdefault((p.shape, p.device, p.dtype), []).append(p)
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        defaults |= {"weight_decay": weight_decay, "normuon": normuon, "beta2": beta2}
        super().__init__([{"params": group} for group in by_shape.values()], defaults)
        self.found_inf: Tensor | None = None
        self._stacks: list[dict[str, Tensor]] = []  # of each group: a state's name -> (count, rows, cols or 1)
        for group in self.param_groups:
            (count, (rows, cols)), device = (len(group["params"]), group["params"][0].shape), group["params"][0].device
            stacks = {"momentum_buffer": torch.zeros((count, rows, cols), device=device)}
            if normuon:
                stacks["second_moment"] = torch.zeros((count, rows, 1), device=device)
            self._stacks.append(stacks)
            for i, p in enumerate(group["params"]):
                self.state[p] = {name: stack[i] for name, stack in stacks.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; in a group all have one or none has."""
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            params = group["params"]
            grads = [p.grad for p in params if p.grad is not None]
            if not grads:
                continue
            if len(grads) != len(params):
                raise ValueError("Muon: some parameters of one shape have gradients and some do not")
            self._update(params, grads, group, **stacks)

    def _update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        group: dict[str, Any],
        momentum_buffer: Tensor,
        second_moment: Tensor | None = None,
    ) -> None:
        """Update parameters of one shape."""
        (rows, cols), device = params[0].shape, params[0].device
        found_inf = self.found_inf
        if found_inf is not None and found_inf.device.type == "cpu":  # where looking costs no wait
            if found_inf:
                return
            found_inf = None
        dtype = compute_dtype(device)
        if device.type == "cuda" and dtype == torch.bfloat16:
            dtype = torch.float16  # eight times as accurate, and nothing leaves its range after the normalization
        x = momentum_pass(grads, momentum_buffer, group["momentum"], group["nesterov"], dtype, found_inf)
        update_pass(
            params,
            orthogonalize(x, group["ns_steps"]),
            lr=group["lr"] * max(1.0, rows / cols) ** 0.5,
            decay=group["lr"] * group["weight_decay"],
            second_moment=second_moment,
            beta=group["beta2"],
            found_inf=found_inf,
        )


class DistMuon(Muon):
    """Muon sharded between ranks; at one rank, which is all that there is so far, Muon itself."""
