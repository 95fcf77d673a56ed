"""Attention on a real GPU: each way that there is against float64, what is chosen, no copies, no synchronization."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vibechat import attention
from vibechat.attention import attend, attention_backend, seen_keys, set_attention
from vibechat.common import UserError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
GPU = torch.device("cuda", 0)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_requested", None)
    yield
    attention._order.close()
    attention._prepared.clear()
    torch.cuda.empty_cache()


def plain(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
    scores = scores.masked_fill(~seen_keys(q.size(1), k.size(1), GPU, **masks), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def packed(T: int, H: int = 4, K: int = 4, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator(GPU).manual_seed(T)
    x = torch.randn(B, T, H + 2 * K, 128, device=GPU, generator=rng).bfloat16()
    q, k, v = x.split((H, K, K), dim=2)
    return q, k, v


def with_gradients(function: Any, inputs: Any, upstream: Tensor, **masks: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves, **masks)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def assert_rule(inputs: tuple[Tensor, Tensor, Tensor], function: Any = attend, **masks: Any) -> None:
    """Relative error against float64 at most 1.5 times that of plain bfloat16 operators."""
    upstream = torch.randn(inputs[0].shape, device=GPU, generator=torch.Generator(GPU).manual_seed(1))
    truth = with_gradients(plain, [x.double() for x in inputs], upstream, **masks)
    mine = with_gradients(function, inputs, upstream, **masks)
    theirs = with_gradients(plain, inputs, upstream, **masks)
    for a, b, true in zip(mine, theirs, truth, strict=True):
        assert (a.double() - true).norm() <= 1.5 * (b.double() - true).norm()


@pytest.mark.parametrize("way", ["auto", "cudnn", "flash", "efficient", "sdpa", "flex"])
@pytest.mark.parametrize(("T", "K"), [(1024, 4), (1024, 2), (1000, 4)], ids=["mha", "gqa", "odd"])
def test_every_way_keeps_the_rule(way: str, T: int, K: int) -> None:
    set_attention(way)
    try:
        attention_backend(GPU)
    except UserError as error:
        pytest.skip(str(error))
    assert_rule(packed(T, 4, K))


@pytest.mark.parametrize("masks", [{"window": 200}, {"documents": 300}, {"window": 200, "documents": 300}], ids=str)
@pytest.mark.parametrize("T", [1024, 1000])
def test_windows_and_documents(masks: dict[str, Any], T: int) -> None:
    if "documents" in masks:
        masks = {**masks, "documents": torch.arange(2 * T, device=GPU).view(2, T) // masks["documents"]}
    assert_rule(packed(T), **masks)
    assert_rule(packed(T, 4, 2), torch.compile(attend, fullgraph=True), **masks)


def test_a_cache_is_decoded_at_any_length() -> None:
    q, k, v = packed(300, 4, 2)
    lengths = torch.tensor([130, 300], device=GPU)
    for T, masks in ((1, {}), (7, {}), (1, {"lengths": lengths}), (7, {"lengths": lengths}), (1, {"window": 50})):
        y, true = attend(q[:, -T:], k, v, **masks), plain(q[:, -T:].double(), k.double(), v.double(), **masks)
        assert (y.double() - true).norm() <= 0.01 * true.norm()


@pytest.mark.skipif(not HOPPER, reason="cuDNN is preferred on Hopper and later")
@pytest.mark.parametrize("compiled", [False, True])
def test_cudnn_really_runs_and_copies_nothing(compiled: bool) -> None:
    assert attention_backend(GPU).startswith("cuDNN")
    leaves = [x.detach().requires_grad_() for x in packed(1024)]
    function = torch.compile(attend, fullgraph=True) if compiled else attend
    dy = torch.randn_like(leaves[0])
    torch.autograd.grad(function(*leaves), leaves, dy)  # plans are built
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(function(*leaves), leaves, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    names = [event.key for event in profiler.key_averages()]
    assert any("cudnn" in name for name in names), names
    kernels = [copy.copy(e.key) for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert not [name for name in kernels if "copy" in name.lower() or "memcpy" in name.lower()], kernels


def test_growing_lengths_do_not_ask_cudnn() -> None:
    with torch.no_grad(), torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        attend(*packed(129))
    assert not [event.key for event in profiler.key_averages() if "cudnn" in event.key]
    assert torch.backends.cuda.cudnn_sdp_enabled()
