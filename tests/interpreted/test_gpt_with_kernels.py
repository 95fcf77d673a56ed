"""The whole model with the kernels in it: loss and gradients keep the rule."""

import pytest
import torch
from torch import Tensor

from tests.interpreted.numerics import assert_no_worse
from vibechat import kernels
from vibechat.gpt import GPT, GPTConfig

KERNELS = "torch,rms_norm=triton,add_rms_norm=triton,qk_norm_rope=triton,linear_cross_entropy=triton"


def model_with(dtype: torch.dtype, n_kv_head: int) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=12, vocab_size=96, n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=128))
    model.init_weights()
    for parameter in model.parameters():  # at initialization half of the gradients are zero
        torch.nn.init.normal_(parameter, std=0.08)
    if dtype == torch.float64:
        model.double()
    model.set_compute_dtype(dtype)
    return model


def loss_and_gradients(backend: str, dtype: torch.dtype, n_kv_head: int) -> dict[str, Tensor]:
    kernels.set_backend(backend)
    model = model_with(dtype, n_kv_head)
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(96, (2, 13), generator=rng)
    loss = model(tokens[:, :-1], tokens[:, 1:].clone())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loss_and_gradients_keep_the_rule(dtype: torch.dtype, n_kv_head: int) -> None:
    truth = loss_and_gradients("torch", torch.float64, n_kv_head)
    eager = loss_and_gradients("torch", dtype, n_kv_head)
    ours = loss_and_gradients(KERNELS, dtype, n_kv_head)
    assert ours.keys() == truth.keys()
    assert any(not torch.equal(ours[name], eager[name]) for name in ours), "no kernel ran"
    for name in truth:
        if name != "loss":
            assert_no_worse(ours[name], eager[name], truth[name])
    slack = 1e-3 if dtype == torch.bfloat16 else 1e-6  # one number: eager may be right by luck
    error, allowed = (abs(float(x["loss"]) - float(truth["loss"])) for x in (ours, eager))
    assert error <= 1.5 * allowed + slack


def test_the_whole_model_is_one_graph_with_kernels() -> None:
    kernels.set_backend(KERNELS)
    model = model_with(torch.float32, 2)
    tokens = torch.randint(96, (1, 13))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    eager = model(inputs, targets)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(inputs, targets)
    torch.testing.assert_close(compiled, eager)
    compiled.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_decoding_with_a_cache_gives_the_same_logits() -> None:
    from vibechat.engine import KVCache

    kernels.set_backend(KERNELS)
    model = model_with(torch.float32, 2)
    tokens = torch.randint(96, (2, 6))
    cache = KVCache(2, 2, 12, 32, 2)
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(tokens[:, a:b], kv_cache=cache) for a, b in ((0, 4), (4, 5), (5, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
