"""Where the largest number of what an fp8 matmul reads is found: the kernels that torch.compile makes of a step, as it
would make them for an H200 at the width and length of depth 26."""

import pytest
import torch
from torch import Tensor

from tests.fused import NEEDS_THIS_INDUCTOR, Kernel, cudnn, kernels_of
from vibechat import fp8, gpt
from vibechat.fp8 import LEFT_TO_COMPILER
from vibechat.gpt import GPT, GPTConfig
from vibechat.kernels import backend
from vibechat.train_step import TrainStep

pytestmark = NEEDS_THIS_INDUCTOR
ROWS, LENGTH = 16, 2048
CONFIG = GPTConfig(LENGTH, 256, 1, 13, 13, 1664)
NORMS = tuple(LEFT_TO_COMPILER)

MADE, AGAIN, ALONE = "in the pass that makes it", "in a pass that computes it from what it is made of", "read for it"


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)


def passes(monkeypatch: pytest.MonkeyPatch, *, ours: tuple[str, ...]) -> list[list[Kernel]]:
    """Kernels of the forward and of the backward pass of a block in fp8, where these ops run by our kernels."""
    monkeypatch.setattr(gpt, "attend", cudnn)
    monkeypatch.setattr(fp8, "_matmul", scaled_mm)
    monkeypatch.setattr(backend, "takes_kernel", lambda op, x: op in ours)
    model = GPT(CONFIG)
    model.set_compute_dtype(torch.bfloat16)
    model.set_fp8(True)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)

    def compiled_step() -> None:
        step = TrainStep(model, [], compile=True)
        step._accumulate([(ids, ids)] * 2)  # two, so that the weights are rounded outside

    return kernels_of(compiled_step)


def where_maxima_are_found(kernels: list[Kernel]) -> list[str]:
    """For each tensor that is rounded, in their order."""
    found = []
    for kernel in kernels:
        made = {node.name for node in kernel}
        for node in kernel:
            if node.reduces and "amax" in node.origins and node.size == (ROWS * LENGTH,):
                computed = node.origins - {"abs", "amax", "reshape", "view", "permute"}
                found.append(MADE if node.reads & made else AGAIN if computed else ALONE)
    return found


@pytest.mark.parametrize(
    ("ours", "forward", "backward"),
    [
        ((), [MADE, MADE, AGAIN], [MADE, AGAIN, MADE, MADE]),
        (("qk_norm_rope",), [MADE, MADE, AGAIN], [MADE, AGAIN, MADE, AGAIN]),
        (("qk_norm_rope", *NORMS), [ALONE, ALONE, AGAIN], [ALONE, AGAIN, ALONE, AGAIN]),
    ],
    ids=["no kernel of ours", "as trained", "all of ours"],
)
def test_nothing_is_read_for_its_maximum_alone(
    ours: tuple[str, ...], forward: list[str], backward: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward the inputs of qkv and of both matrices of the MLP (that of attention's projection is bounded); backward
    the gradients of all four products, the last first. Behind kernels of norms four would be, which are left out."""
    there, back = passes(monkeypatch, ours=ours)
    assert where_maxima_are_found(there) == forward
    assert where_maxima_are_found(back) == backward
    rounded = {node.size for kernel in there + back for node in kernel if node.dtype in (fp8.E4M3, fp8.E5M2)}
    assert all(ROWS * LENGTH in size for size in rounded), "a weight is rounded in the graph"
