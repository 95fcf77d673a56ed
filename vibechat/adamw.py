"""AdamW for the embeddings and the head, in one fused pass.

At one rank, which is all that there is so far, it is torch's own fused AdamW (Loshchilov and Hutter 2019, arXiv
1711.05101) with its state allocated when it is made, so that loading a checkpoint is copying in place, and with the
constructor that sharding between ranks (Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054) will keep.
"""

from typing import Any

import torch


class DistAdamW(torch.optim.AdamW):
    """AdamW over parameter groups; `state[p]` holds exp_avg, exp_avg_sq and step.

    Set `found_inf` to a 0-d float32 tensor on the parameters' device, and step() changes nothing when it is nonzero,
    without the host ever looking.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(param_groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        self.found_inf: torch.Tensor | None = None
        self.grad_scale: torch.Tensor | None = None
