"""How many kernels a micro-batch launches, as torch.compile would make them for an H200: what CUDA graphs can save."""

import pytest
import torch

from tests.fused import NEEDS_THIS_INDUCTOR, cudnn, kernels_of
from tests.test_fp8_fusion import LENGTH, ROWS
from vibechat import gpt
from vibechat.gpt import GPT, GPTConfig
from vibechat.kernels import backend
from vibechat.train_step import TrainStep

pytestmark = NEEDS_THIS_INDUCTOR


def test_a_layer_is_13_kernels_forward_and_18_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the width of depth 26, in bfloat16 without kernels of ours, matmuls and attention counted."""
    monkeypatch.setattr(gpt, "attend", cudnn)
    monkeypatch.setattr(backend, "takes_kernel", lambda op, x: False)
    counts = []
    for layers in (1, 2):
        model = GPT(GPTConfig(LENGTH, 256, layers, 13, 13, 1664))
        model.set_compute_dtype(torch.bfloat16)
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)

        def compiled_step(model: GPT = model, ids: torch.Tensor = ids) -> None:
            TrainStep(model, [], compile=True, say=lambda text: None)._accumulate([(ids, ids)] * 2)

        graphs = kernels_of(compiled_step)
        counts.append([len(kernels) for kernels in graphs])
    (forward, backward), (forward_of_two, backward_of_two) = counts
    assert (forward_of_two - forward, backward_of_two - backward) == (13, 18)
