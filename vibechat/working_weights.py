"""The copies of the weights that matmuls read, made once a step, and their gradients, added up in float32.

Master weights are float32, matmuls run in bfloat16, several parameters may be the rows of one matrix, and for fp8 they
are rounded once more. Done inside the forward, that would be done again for every micro-batch, and the backward of the
cast would write each gradient out in float32 before it is added to the others: for N weights 24 N bytes a micro-batch.
Here the leaf that autograd knows is the bfloat16 copy. Its gradient, bfloat16 as the matmul made it, is added to the
masters' float32 gradients as soon as it is there, in one pass of 10 N bytes, and forgotten; the copies are made anew at
the start of each step in one call, 6 N bytes (11 N more in fp8). Rounding is the same either way.
"""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vibechat.fp8 import Fp8Weight, round_weights


class WorkingWeights:
    """Copies of master weights in the dtype that matmuls run in.

    Args:
        masters: {name of a copy: the parameters, matrices, whose rows it is}; their gradients are what backward leaves.
        dtype: of the copies.
        fp8: {name of an `Fp8Linear`: name of the copy that it multiplies by}.

    `tensors` is what the model computes with (torch.func.functional_call), {name: tensor}: the copies, and the buffers
    of each Fp8Linear.
    """

    def __init__(
        self, masters: Mapping[str, Sequence[Tensor]], dtype: torch.dtype, fp8: Mapping[str, str] | None = None
    ) -> None:
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}
        self._masters: list[Tensor] = []
        self._rows: list[Tensor] = []  # of the copies, where each master goes
        for name, parts in masters.items():
            sizes = [part.size(0) for part in parts]
            copy = torch.empty(sum(sizes), *parts[0].shape[1:], dtype=dtype, device=parts[0].device)
            self._masters += parts
            self._rows += copy.detach().split(sizes)
            copy.requires_grad_(True)
            copy.register_post_accumulate_grad_hook(functools.partial(_add_to_masters, parts))
            self.tensors[name] = copy
        self.fp8: dict[str, tuple[Tensor, Fp8Weight]] = {}
        for linear, name in (fp8 or {}).items():
            copy, rounded = self.tensors[name], Fp8Weight.like(self.tensors[name])
            self.fp8[linear] = copy, rounded
            self.tensors |= {f"{linear}.{field}": tensor for field, tensor in rounded._asdict().items()}
        for tensor in self.tensors.values():
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs then read it where it is, without a copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Make everything from the masters. Before the first micro-batch of a step."""
        torch._foreach_copy_(self._rows, self._masters)
        if self.fp8:
            round_weights(*zip(*self.fp8.values(), strict=True))


def _add_to_masters(masters: Sequence[Tensor], copy: Tensor) -> None:
    gradient, copy.grad = copy.grad, None
    assert gradient is not None
    for master, rows in zip(masters, gradient.split([master.size(0) for master in masters]), strict=True):
        if master.grad is None:
            master.grad = rows.to(master.dtype)
        else:
            master.grad.add_(rows)
