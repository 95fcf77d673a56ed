"""The kernels on a real GPU at real shapes: the rule, bitwise determinism, no synchronization, training that agrees.

`pytest -m gpu` runs them; where there is no GPU they are skipped and counted.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreted.numerics import assert_no_worse, check
from vibechat import kernels
from vibechat.gpt import GPT, GPTConfig
from vibechat.kernels import backend
from vibechat.kernels.qk_norm_rope import reference as rope_reference
from vibechat.kernels.rms_norm import add_reference, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
KERNELS = "torch,rms_norm=triton,add_rms_norm=triton,qk_norm_rope=triton"
SHAPES = [(4, 2048, 768), (2, 2048, 1280), (2, 2048, 1664), (3, 1023, 1664), (1, 1, 768)]


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_decided", {})
    kernels.set_backend(KERNELS)
    yield
    torch.cuda.empty_cache()


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    rng = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=rng).to(dtype)


def packed(B: int, T: int, H: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, k, _ = randn(B, T, H + 2 * K, 128, dtype=dtype).split((H, K, K), dim=2)
    return q, k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_keep_the_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, r, dsum, dy = (randn(*shape, dtype=dtype, seed=seed) for seed in range(4))
    check(kernels.rms_norm, reference, [x], [dy])
    check(kernels.add_rms_norm, add_reference, [r, x], [dsum, dy])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("B", "T", "H", "K"), [(2, 2048, 13, 13), (4, 2048, 6, 6), (2, 1001, 10, 5), (8, 1, 6, 2)])
def test_qk_norm_rope_keeps_the_rule(B: int, T: int, H: int, K: int, dtype: torch.dtype) -> None:
    q, k = packed(B, T, H, K, dtype)
    cos, sin = kernels.rotary_tables(T, 128, 10_000.0, "cuda")
    dq, dk = (randn(B, heads, T, 128, dtype=dtype, seed=1).transpose(1, 2) for heads in (H, K))
    check(
        lambda q, k: kernels.qk_norm_rope(q, k, cos, sin), lambda q, k: rope_reference(q, k, cos, sin), [q, k], [dq, dk]
    )


def passes() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Each op forward and backward on a d26 micro-batch of two rows; what it returns."""
    x, r, dy = (randn(2, 2048, 1664, seed=seed).requires_grad_(seed < 2) for seed in range(3))
    q, k = (t.detach().requires_grad_() for t in packed(2, 2048, 13, 13, torch.bfloat16))
    cos, sin = kernels.rotary_tables(2048, 128, 10_000.0, "cuda")

    def run(op: Callable[..., Any], inputs: list[Tensor], *rest: Tensor) -> tuple[Tensor, ...]:
        y = op(*inputs, *rest)
        y = (y,) if isinstance(y, Tensor) else y
        upstream = [dy.view(v.shape) for v in y]
        return *y, *torch.autograd.grad(y, inputs, upstream)

    return {
        "rms_norm": lambda: run(kernels.rms_norm, [x]),
        "add_rms_norm": lambda: run(kernels.add_rms_norm, [r, x]),
        "qk_norm_rope": lambda: run(kernels.qk_norm_rope, [q, k], cos, sin),
    }


OPS = ["rms_norm", "add_rms_norm", "qk_norm_rope"]


@pytest.mark.parametrize("name", OPS)
def test_two_runs_are_equal_to_the_last_bit(name: str) -> None:
    run = passes()[name]
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", OPS)
def test_the_host_never_waits(name: str) -> None:
    run = passes()[name]
    run()  # compiled and loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPS)
def test_it_can_be_captured_in_a_graph(name: str) -> None:
    run = passes()[name]
    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_offsets_pass_2_to_the_31() -> None:
    rows = 2**31 // 1664 + 1000
    x = randn(1, 1000, 1664).expand(-(-rows // 1000), -1, -1).contiguous()
    y = kernels.rms_norm(x)
    assert torch.equal(y[-1], y[0])
    del x, y
    heads = 2**31 // (2048 * 128) // 13 + 1
    q = randn(1, 2048, 13, 128).expand(heads, -1, -1, -1).contiguous()
    turned = kernels.qk_norm_rope(q, q[:, :, :1], *kernels.rotary_tables(2048, 128, 10_000.0, "cuda"))[0]
    assert torch.equal(turned[-1], turned[0])


def test_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    x = randn(2, 64, 256).requires_grad_()
    compiled = torch.compile(lambda x: kernels.add_rms_norm(x, kernels.rms_norm(2 * x))[1].sin().sum(), fullgraph=True)
    (ours,) = torch.autograd.grad(compiled(x), x)
    kernels.set_backend("torch")
    (theirs,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def train(spec: str, dtype: torch.dtype, data_seed: int) -> float:
    """Mean loss of the last 50 of 200 steps of a small model on text-like tokens."""
    kernels.set_backend(spec)
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=256, vocab_size=512, n_layer=4, n_head=4, n_kv_head=2, n_embd=512)).cuda()
    model.init_weights()
    model.set_compute_dtype(dtype)
    optimizers = model.setup_optimizers()
    rng = torch.Generator().manual_seed(data_seed)
    chain = torch.randint(512, (512, 4), generator=rng)  # each token is followed by one of four
    losses = []
    for _ in range(200):
        tokens = [torch.randint(512, (16,), generator=rng)]
        for choice in torch.randint(4, (256, 16), generator=rng):
            tokens.append(chain[tokens[-1], choice])
        batch = torch.stack(tokens, dim=1).cuda()
        loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses[-50:]).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("data_seed", [0, 1, 2])
def test_training_ends_where_float32_ends(data_seed: int) -> None:
    truth = train("torch", torch.float32, data_seed)
    eager = train("torch", torch.bfloat16, data_seed)
    ours = train(KERNELS, torch.bfloat16, data_seed)
    assert abs(ours - truth) <= 1.5 * abs(eager - truth), f"float32 {truth:.5f}, eager {eager:.5f}, kernels {ours:.5f}"


def test_model_gradients_keep_the_rule() -> None:
    def gradients(spec: str, dtype: torch.dtype) -> dict[str, Tensor]:
        kernels.set_backend(spec)
        torch.manual_seed(0)
        model = GPT(GPTConfig(sequence_len=512, vocab_size=1024, n_layer=2, n_head=6, n_kv_head=6, n_embd=768)).cuda()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.04)
        model = model.double() if dtype == torch.float64 else model
        model.set_compute_dtype(dtype)
        tokens = torch.randint(1024, (2, 513), generator=torch.Generator().manual_seed(1)).cuda()
        model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    truth, eager = gradients("torch", torch.float64), gradients("torch", torch.bfloat16)
    ours = gradients(KERNELS, torch.bfloat16)
    for name in truth:
        assert_no_worse(ours[name], eager[name], truth[name])
