"""The copies of the weights that matmuls read, cast once a step, and their gradients, added up in float32.

Master weights are float32, matmuls run in bfloat16. A cast inside the forward would be made again for every
micro-batch, and its backward would write each gradient out in float32 before it is added to the others: for N weights
24 N bytes a micro-batch. Here the leaf that autograd knows is the bfloat16 copy. Its gradient, bfloat16 as the matmul
made it, is added to the master's float32 gradient as soon as it is there, in one pass of 10 N bytes, and forgotten;
the copies are made anew at the start of each step in one call, 6 N bytes. Rounding is the same either way.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor


class WorkingWeights:
    """Copies of master weights in the dtype that matmuls run in.

    Args:
        masters: parameters by name; their gradients are what backward leaves.
        dtype: of the copies.

    `copies` is what the model computes with (torch.func.functional_call), {name: tensor}.
    """

    def __init__(self, masters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._masters = list(masters.values())
        self.dtype = dtype
        self.copies = {name: torch.empty_like(master, dtype=dtype) for name, master in masters.items()}
        for master, copy in zip(self._masters, self.copies.values(), strict=True):
            copy.requires_grad_(True)
            torch._dynamo.mark_static_address(copy)  # CUDA graphs read it where it is, and do not copy it in each time
            copy.register_post_accumulate_grad_hook(functools.partial(_add_to_master, master))

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast every master, in one call. Before the first micro-batch of a step."""
        torch._foreach_copy_(list(self.copies.values()), self._masters)


def _add_to_master(master: Tensor, copy: Tensor) -> None:
    gradient, copy.grad = copy.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
