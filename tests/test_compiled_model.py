"""A model with our kernels through torch.compile, as far as that goes without a GPU."""

from unittest import mock

import pytest
import torch
from torch._inductor import lowering
from torch._inductor.exc import OperatorIssue

from tests.fused import NEEDS_THIS_INDUCTOR, cudnn, kernels_of
from vibechat import gpt
from vibechat.gpt import GPT, GPTConfig
from vibechat.kernels import OPS, backend
from vibechat.train_step import TrainStep

pytestmark = NEEDS_THIS_INDUCTOR


def test_inductor_knows_our_ops_before_it_meets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes down of one that it does not know grows fourfold with each block."""
    monkeypatch.setattr(gpt, "attend", cudnn)
    monkeypatch.setattr(backend, "INTERPRETING", True)
    monkeypatch.setattr(backend, "choose", lambda op, device, dtype: backend.Choice(op, "triton", "for this test"))
    monkeypatch.setattr(backend, "_decided", {})
    backend._tell_inductor.cache_clear()
    for op in [op for op in lowering.lowerings if str(op).startswith("vibechat.")]:  # as in a new process
        del lowering.lowerings[op]
    model = GPT(GPTConfig(128, 256, 3, 2, 2, 128))
    model.set_compute_dtype(torch.bfloat16)
    ids = torch.zeros(2, 128, dtype=torch.long)
    with mock.patch.object(OperatorIssue, "operator_str", side_effect=AssertionError("an op that it does not know")):
        there, _ = kernels_of(lambda: TrainStep(model, [], compile=True)._accumulate([(ids, ids)] * 2))
    assert set(OPS) - {"newton_schulz"} <= {origin for kernel in there for node in kernel for origin in node.origins}
