"""`attend` against softmax(q k^T) v written out, in every way that it may run, and what it says that it runs."""

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from vibechat import attention, attention_blocked
from vibechat.attention import attend, attention_backend, block_mask, seen_keys, set_attention
from vibechat.common import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_requested", None)
    monkeypatch.delenv("VIBECHAT_ATTENTION", raising=False)
    yield
    attention._order.close()
    attention._prepared.clear()
    attention._packaged.clear()


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_blocked_is_faster", lambda q: True)
    monkeypatch.setattr(attention_blocked, "QUERIES_PER_BLOCK", 8)


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    documents: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """One query at a time, from the words of the docstring."""
    T, S = q.size(1), k.size(1)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    rows = []
    for b in range(q.size(0)):
        outputs = []
        for i in range(T):
            at = (S if lengths is None else int(lengths[b])) - T + i
            keys = [j for j in range(at + 1) if window is None or at - j < window]
            keys = [j for j in keys if documents is None or documents[b, j] == documents[b, at]]
            scores = torch.einsum("hd,jhd->hj", q[b, i], k[b, keys]) / q.size(-1) ** 0.5
            outputs.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v[b, keys]))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def qkv(T: int, S: int, H: int, K: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T + S)
    shapes = ((2, T, H, 8), (2, S, K, 8), (2, S, K, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def with_gradients(function: Callable[..., Tensor], inputs: Iterable[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def assert_same(inputs: tuple[Tensor, Tensor, Tensor], **masks: Any) -> None:
    """Outputs and gradients in float64."""
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = with_gradients(lambda q, k, v: attend(q, k, v, **masks), inputs, upstream)
    theirs = with_gradients(lambda q, k, v: written_out(q, k, v, **masks), inputs, upstream)
    for name, a, b in zip(("y", "dq", "dk", "dv"), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# the definition


@pytest.mark.parametrize(("T", "S"), [(1, 1), (9, 9), (1, 9), (4, 9)], ids=["one", "training", "decoding", "chunk"])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("window", [None, 1, 3, 20], ids=str)
def test_attend_is_softmax_attention(T: int, S: int, H: int, K: int, window: int | None) -> None:
    assert_same(qkv(T, S, H, K), window=window)


@pytest.mark.parametrize("way", ["sdpa", "math"])
def test_a_way_that_was_asked_for_gives_the_same(way: str) -> None:
    set_attention(way)
    assert_same(qkv(9, 9, 4, 2))
    assert_same(qkv(9, 9, 4, 2), window=3)


@given(st.integers(1, 4), st.integers(4, 12), st.integers(0, 2**30), st.sampled_from([None, 2, 5]))
@settings(max_examples=15, deadline=None)
def test_ragged_lengths(T: int, S: int, seed: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(T, S + 1, (2,), generator=generator)
    q, k, v = qkv(T, S, 4, 2)
    for x in (k, v):  # what lies past a row's length is never read, whatever it is
        for b, length in enumerate(lengths.tolist()):
            x[b, length:] = 1e30
    assert_same((q, k, v), lengths=lengths, window=window)


@given(st.integers(0, 2**30), st.integers(1, 17), st.sampled_from([None, 2, 5]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_documents(seed: int, S: int, window: int | None, training: bool) -> None:
    starts = torch.rand(2, S, generator=torch.Generator().manual_seed(seed)) < 0.3
    assert_same(qkv(S if training else 1, S, 4, 2), documents=starts.cumsum(1), window=window)


def test_a_document_attends_as_if_it_stood_alone() -> None:
    q, k, v = qkv(9, 9, 4, 4)
    y = attend(q, k, v, documents=torch.tensor([[0] * 4 + [1] * 5] * 2))
    torch.testing.assert_close(y[:, :4], attend(q[:, :4], k[:, :4], v[:, :4]))
    torch.testing.assert_close(y[:, 4:], attend(q[:, 4:], k[:, 4:], v[:, 4:]))


def test_a_cache_with_a_window_decodes_what_training_computes() -> None:
    q, k, v = qkv(40, 40, 4, 2)
    whole = attend(q, k, v, window=7)
    for start, stop in ((0, 5), (5, 6), (6, 20), (20, 21)):
        step = attend(q[:, start:stop], k[:, :stop], v[:, :stop], window=7)
        torch.testing.assert_close(step, whole[:, start:stop])


def test_what_cannot_be_is_refused() -> None:
    q, k, v = qkv(2, 2, 2, 2)
    with pytest.raises(ValueError, match="window=0"):
        attend(q, k, v, window=0)
    with pytest.raises(ValueError, match="documents and lengths"):
        attend(q, k, v, documents=torch.zeros(2, 2), lengths=torch.ones(2))


# ---------------------------------------------------------------------------------------------------------------------
# in blocks, on a CPU


@pytest.mark.parametrize("T", [1, 3, 8, 21])
@pytest.mark.parametrize("window", [None, 1, 5, 12], ids=str)
@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
@pytest.mark.usefixtures("blocked")
def test_blocked_attention_and_its_gradient(T: int, window: int | None, with_documents: bool) -> None:
    documents = (torch.arange(2 * T).view(2, T) // 4) if with_documents else None
    assert_same(qkv(T, T, 2, 2), window=window, documents=documents)


@pytest.mark.usefixtures("blocked")
def test_gradcheck_of_blocked_attention() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(11, 11, 2, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, window=9), (q, k, v))


@pytest.mark.usefixtures("blocked")
def test_blocked_attention_in_bfloat16_rounds_like_plain_matmuls() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
        scores = scores.masked_fill(~seen_keys(q.size(1), k.size(1), CPU), -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)

    inputs = qkv(96, 96, 2, 2, torch.bfloat16)
    upstream = qkv(96, 96, 2, 2, torch.bfloat16)[1]
    truth = with_gradients(plain, (x.double() for x in inputs), upstream)
    mine, theirs = (with_gradients(function, inputs, upstream) for function in (attend, plain))
    for a, b, true in zip(mine, theirs, truth, strict=True):
        assert (a.double() - true).norm() <= 1.3 * (b.double() - true).norm()


def test_a_window_is_cut_out_before_anything_is_multiplied() -> None:
    blocks = attention_blocked.blocks(1000, 100)
    assert [(b.start, b.stop) for b in blocks] == [(0, 256), (256, 512), (512, 768), (768, 1000)]
    assert [b.first for b in blocks] == [0, 157, 413, 669]
    assert all(block.first == 0 for block in attention_blocked.blocks(1000))


def test_blocked_attention_is_for_compiled_training_on_a_cpu() -> None:
    q = torch.zeros(1, 2, 4, 8, requires_grad=True)
    assert not attention._blocked_is_faster(q)  # eager
    taken = []

    def probe(q: Tensor) -> Tensor:
        taken.append(attention._blocked_is_faster(q))
        return q * 2

    torch.compile(probe, backend="eager")(q)
    with torch.no_grad():
        torch.compile(probe, backend="eager")(q)
    set_attention("sdpa")  # compiled anew: the request is guarded
    torch.compile(probe, backend="eager")(q)
    assert taken == [True, False, False]


@pytest.mark.parametrize("T", [1, 7, 128])
def test_no_graph_break(T: int) -> None:
    q, k, v = (x.float().requires_grad_() for x in qkv(T, 128, 4, 2))
    masks: list[dict[str, Any]] = [{}, {"window": 5}, {"documents": torch.zeros(2, 128, dtype=torch.long)}]
    for mask in masks:
        torch._dynamo.reset()
        compiled = torch.compile(lambda q, k, v, mask=mask: attend(q, k, v, **mask), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v, **mask))


# ---------------------------------------------------------------------------------------------------------------------
# no copies


class Dispatched(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("T", [1, 16], ids=["decoding", "training"])
def test_views_of_a_packed_projection_are_read_in_place(H: int, K: int, T: int) -> None:
    packed = torch.randn(2, 16, H + 2 * K, 8, requires_grad=True)
    q, k, v = packed.split((H, K, K), dim=2)
    with Dispatched() as seen:
        y = attend(q[:, -T:], k, v)
        y.reshape(2, T, H * 8)  # what the projection after it reads
    attending = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"}
    views = {"transpose", "slice", "view", "_unsafe_view", "detach", "alias"}
    assert set(seen.names) - views <= attending, seen.names
    assert sum(name in attending for name in seen.names) == 1
    assert y.transpose(1, 2).stride(-1) == 1


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention; on a CPU it has no backward, and runs only as its own plain definition


@given(st.integers(1, 3), st.sampled_from([None, 3, 100]), st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_block_mask_of_flex_attention_sees_the_same_keys(
    tiles: int, window: int | None, with_documents: bool
) -> None:
    T = 128 * tiles - 40
    documents = torch.arange(2 * T).view(2, T) // 50 if with_documents else None
    mask = block_mask(T, window, documents, CPU)
    b, q, k = torch.arange(2)[:, None, None], torch.arange(T)[None, :, None], torch.arange(T)[None, None, :]
    seen = mask.mask_mod(b, torch.tensor(0), q, k).expand(2, T, T)
    torch.testing.assert_close(seen, seen_keys(T, T, CPU, window=window, documents=documents)[:, 0].expand(2, T, T))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_softmax_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_takes_flex", lambda q, masked: True)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attention.flex_attention)
    q, k, v = qkv(150, 150, 4, 2, torch.float32)
    documents = torch.arange(300).view(2, 150) // 40
    masks: list[dict[str, Any]] = [{}, {"window": 9}, {"documents": documents}, {"window": 9, "documents": documents}]
    for mask in masks:
        torch.testing.assert_close(attend(q, k, v, **mask), written_out(q, k, v, **mask))


def masks_in_graphs(mask: dict[str, Any], layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a block mask is made in the graphs of a training step of so many layers, after AOTAutograd."""
    monkeypatch.setattr(attention, "_takes_flex", lambda q, masked: True)
    monkeypatch.setattr(attention, "_blocked_is_faster", lambda q: False)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # it refuses CPUs
    sorts: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sorts.append(sum(node.target is torch.ops.aten.sort.stable for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def several(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
        for _ in range(layers):
            q = attend(q, k, v, **mask)
        return q

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(several, backend=backend, fullgraph=True)
    q, k, v = (x.float().requires_grad_() for x in qkv(128, 128, 2, 2))
    for _ in range(2):
        compiled(q, k, v, **mask).sum().backward()
    assert len(sorts) == 2  # forward and backward, once
    assert sum(sorts) % 4 == 0  # the keys of each query and the queries of each key, of full blocks and of others
    return sum(sorts) // 4


@pytest.mark.parametrize("layers", [1, 3])
def test_a_graph_has_its_block_masks_made_before_or_once(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of windows are made when it is compiled, that of documents once in each run, for all layers; no break."""
    monkeypatch.setattr(attention, "_windows", attention._Windows())
    assert masks_in_graphs({"window": 5}, layers, monkeypatch) == 0
    assert len(vars(attention._windows)) == 1
    assert masks_in_graphs({"documents": torch.arange(256).view(2, 128) // 40}, layers, monkeypatch) == 1


def test_block_masks_are_kept() -> None:
    documents = torch.zeros(1, 128, dtype=torch.long)
    assert block_mask(128, 5, None, CPU) is block_mask(128, 5, None, CPU)
    mask = block_mask(128, 5, documents, CPU)
    assert block_mask(128, 5, documents, CPU) is mask
    assert block_mask(128, 5, documents.clone(), CPU) is not mask
    mask = block_mask(128, 5, documents, CPU)
    documents[0, 64:] = 1  # changed in place
    assert block_mask(128, 5, documents, CPU) is not mask


# ---------------------------------------------------------------------------------------------------------------------
# choosing


def test_a_run_can_say_what_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "blocked matmuls up to 1024 tokens" in attention_backend(CPU)
    assert attention_backend(torch.device("mps")) == "scaled_dot_product_attention"
    set_attention("math")
    assert attention_backend(CPU) == "scaled_dot_product_attention (unfused)"
    monkeypatch.setenv("VIBECHAT_ATTENTION", "sdpa")
    set_attention("auto")
    assert "blocked" in attention_backend(CPU)  # the flag wins
    monkeypatch.setattr(attention, "_requested", None)
    assert attention_backend(CPU) == "scaled_dot_product_attention"


@pytest.mark.parametrize("way", ["cudnn", "flash", "efficient", "flex"])
def test_what_a_cpu_does_not_have_is_refused_in_one_line(way: str) -> None:
    set_attention(way)
    with pytest.raises(UserError, match=f"^--attention {way}: it needs a CUDA GPU, and this is cpu; use auto, .*$"):
        attention_backend(CPU)


def test_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--attention fast: unknown; one of auto, cudnn, flash"):
        set_attention("fast")
    monkeypatch.setenv("VIBECHAT_ATTENTION", "fast")
    with pytest.raises(UserError, match="VIBECHAT_ATTENTION=fast"):
        attention_backend(CPU)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A CUDA device that is only asked what it is, not for tensors."""
    machine: dict[str, Any] = {"capability": (9, 0), "takes": SDPBackend.CUDNN_ATTENTION}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: machine["capability"])
    monkeypatch.setattr(attention, "_chosen", lambda *_: machine["takes"])
    return machine


def priorities() -> list[SDPBackend]:
    return [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]


GPU = torch.device("cuda", 0)


def test_hopper_asks_for_cudnn_first_and_older_gpus_do_not(cuda: dict[str, Any]) -> None:
    before = priorities()
    assert before[0] == SDPBackend.FLASH_ATTENTION  # what PyTorch does by itself
    assert attention_backend(GPU) == "cuDNN; FlexAttention for windows and documents"
    assert priorities()[0] == SDPBackend.CUDNN_ATTENTION
    attention._order.close()
    attention._prepared.clear()
    assert priorities() == before
    cuda.update(capability=(8, 0), takes=SDPBackend.FLASH_ATTENTION)
    assert attention_backend(GPU) == "flash-attention 2; FlexAttention for windows and documents"
    assert priorities() == before


def test_a_way_is_forced_or_refused(cuda: dict[str, Any]) -> None:
    set_attention("cudnn")
    assert attention_backend(GPU).startswith("cuDNN, asked for")
    cuda["takes"] = SDPBackend.EFFICIENT_ATTENTION
    with pytest.raises(UserError, match=r"--attention cudnn: .* \(it takes memory-efficient\); use auto"):
        attention_backend(GPU)
    set_attention("flash")
    with pytest.raises(UserError, match="--attention flash"):
        attention_backend(GPU)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    set_attention("sdpa")
    assert attention_backend(GPU).startswith("memory-efficient, PyTorch's own choice")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    set_attention("flex")
    assert attention_backend(GPU) == "FlexAttention, asked for"


def test_the_order_is_put_in_force_once(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    real = attention.sdpa_kernel
    monkeypatch.setattr(attention, "sdpa_kernel", lambda *a, **k: entered.append(a) or real(*a, **k))
    for _ in range(3):
        attention._prepare(None, GPU)
        attention._prepare(None, CPU)
    assert len(entered) == 1


def test_a_newer_flash_attention_is_used_where_it_is_installed(
    cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    activated: list[str] = []
    cuda["takes"] = SDPBackend.FLASH_ATTENTION
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if "cute" in name else None)
    set_attention("flash")
    assert attention_backend(GPU).startswith("flash-attention 4, asked for")
    attention_backend(GPU)
    assert activated == ["FA4"]


# ---------------------------------------------------------------------------------------------------------------------
# the package of flash-attention 2, of which only what it promises is here


class Package:
    """flash_attn: (B, T, H, D), grouped heads, causal masks and windows aligned at the last query and the last key."""

    __version__ = "2.8.3"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        self.calls.append("deterministic" if deterministic else "func")
        lengths = torch.full((q.size(0),), k.size(1))
        return self._attend(q, k, v, lengths, causal, window_size)

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert cache_seqlens.dtype == torch.int32
        self.calls.append("cache")
        return self._attend(q, k_cache, v_cache, cache_seqlens, causal, window_size)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool, window_size: tuple[int, int]
    ) -> Tensor:
        left, right = window_size
        right = 0 if causal else right
        key = torch.arange(k.size(1)).view(1, 1, -1)
        at = (torch.arange(q.size(1)) - q.size(1)).view(1, -1, 1) + lengths.view(-1, 1, 1)
        seen = (key < lengths.view(-1, 1, 1)) & ((key <= at + right) | (right < 0)) & ((key >= at - left) | (left < 0))
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    """It is installed and preferred."""
    fake = Package()
    monkeypatch.setattr(attention, "_flash_attn", fake)
    monkeypatch.setattr(attention, "_takes_package", lambda q: True)
    return fake


@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (4, 9)], ids=["training", "decoding", "chunk"])
@pytest.mark.parametrize("window", [None, 1, 3, 20], ids=str)
def test_the_package_is_asked_for_the_same_attention(T: int, S: int, window: int | None, package: Package) -> None:
    assert_same(qkv(T, S, 4, 2), window=window)
    assert package.calls == ["func"]
    documents = torch.arange(2 * S).view(2, S) // 4
    assert_same(qkv(T, S, 4, 2), window=window, documents=documents)
    assert package.calls == ["func"]  # it has none


@pytest.mark.parametrize("window", [None, 2], ids=str)
def test_the_package_decodes_ragged_lengths_but_has_no_gradient_there(window: int | None, package: Package) -> None:
    q, k, v = qkv(2, 9, 4, 2)
    lengths = torch.tensor([3, 9])
    y = attend(q, k, v, lengths=lengths, window=window)
    torch.testing.assert_close(y, written_out(q, k, v, lengths=lengths, window=window))
    assert package.calls == ["cache"]
    assert_same((q, k, v), lengths=lengths, window=window)
    assert package.calls == ["cache"]


def test_the_package_is_told_to_be_deterministic(package: Package) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        attend(*qkv(4, 4, 2, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert package.calls == ["deterministic"]


def test_the_package_breaks_no_graph(package: Package) -> None:
    torch._dynamo.reset()
    q, k, v = (x.float() for x in qkv(8, 8, 4, 2))
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, window=3), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), written_out(q, k, v, window=3))


def installed(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if name == "flash_attn" else None)
    monkeypatch.setattr(attention, "_flash_attn", None)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_the_package_runs_where_flash_attention_does(
    cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    installed(monkeypatch, Package())
    cuda.update(capability=capability, takes=SDPBackend.FLASH_ATTENTION)
    set_attention("flash")
    assert attention_backend(GPU) == "flash-attention 2.8.3 (flash_attn), asked for; FlexAttention for documents"
    assert attention._package_is_preferred("flash", GPU, torch.bfloat16, 128)
    set_attention("auto")
    assert attention._package_is_preferred("auto", GPU, torch.bfloat16, 128)  # cuDNN cannot, say
    cuda["takes"] = SDPBackend.CUDNN_ATTENTION
    attention._packaged.clear()
    assert not attention._package_is_preferred("auto", GPU, torch.bfloat16, 128)
    assert attention_backend(GPU) == "cuDNN; FlexAttention for windows and documents"
    for other in ("sdpa", "efficient", "math"):
        assert not attention._package_is_preferred(other, GPU, torch.bfloat16, 128)


def test_flash_attention_3_and_4_come_first(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, Package())
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention, "activate_flash_attention_impl", lambda name: None)
    cuda["takes"] = SDPBackend.FLASH_ATTENTION
    set_attention("flash")
    assert attention_backend(GPU).startswith("flash-attention 3, asked for; FlexAttention for windows")
    assert not attention._package_is_preferred("flash", GPU, torch.bfloat16, 128)


def test_a_package_that_is_too_old_or_a_part_of_4_is_not_taken(
    cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda["takes"] = SDPBackend.FLASH_ATTENTION
    set_attention("flash")
    installed(monkeypatch, types.ModuleType("flash_attn"))
    assert attention_backend(GPU).startswith("flash-attention 2, asked for")
    attention._order.close()
    attention._prepared.clear()
    old = Package()
    old.__version__ = "2.5.8"  # type: ignore[misc]
    installed(monkeypatch, old)
    with pytest.warns(
        UserWarning, match=r"flash_attn is installed but cannot be used: it is 2\.5\.8, and 2\.7 is needed"
    ):
        assert attention_backend(GPU).startswith("flash-attention 2, asked for")


def test_a_flash_attention_that_cannot_be_used_costs_a_line(
    cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("undefined symbol")

    cuda["takes"] = SDPBackend.FLASH_ATTENTION
    monkeypatch.setattr(attention, "activate_flash_attention_impl", broken)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if "interface" in name else None)
    set_attention("flash")
    with pytest.warns(UserWarning, match="flash_attn_interface is installed but cannot be used: undefined symbol"):
        assert attention_backend(GPU).startswith("flash-attention 2, asked for")
