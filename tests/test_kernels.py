"""The reference ops against the slow and obvious, in float64, and the choice between backends."""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vibechat import kernels
from vibechat.kernels import backend
from vibechat.kernels.linear_cross_entropy import _GradientsInBackward, reference, rows_per_chunk
from vibechat.kernels.relu2_mlp import reference as relu2_reference


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# norms, rotary, MLP


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_rms_norm_divides_by_the_root_mean_square(dtype: torch.dtype, error: float) -> None:
    x, r = randn(3, 5, 48, dtype=dtype), randn(3, 5, 48, dtype=dtype, seed=1)
    wide = x.double()
    assert relative(kernels.rms_norm(x), wide / (wide.square().mean(-1, keepdim=True) + 2**-23).sqrt()) < error
    total, normed = kernels.add_rms_norm(r, x)
    assert torch.equal(total, r + x)
    assert torch.equal(normed, kernels.rms_norm(r + x))
    assert kernels.rms_norm(torch.zeros(2, 8, dtype=dtype)).abs().max() == 0


def test_rotary_turns_each_pair_by_its_angle() -> None:
    cos, sin = kernels.rotary_tables(7, 8, 10_000.0, "cpu")
    assert cos.dtype == sin.dtype == torch.float32
    q, k = randn(2, 7, 3, 8), randn(2, 7, 1, 8, seed=1)
    rotated, _ = kernels.qk_norm_rope(q, k, cos, sin)
    normed = kernels.rms_norm(q)
    for t, i in itertools.product(range(7), range(4)):
        angle = t * 10_000 ** (-2 * i / 8)
        pair = torch.complex(normed[:, t, :, i], normed[:, t, :, i + 4]) * complex(math.cos(angle), -math.sin(angle))
        assert relative(rotated[:, t, :, i], pair.real) < 1e-5
        assert relative(rotated[:, t, :, i + 4], pair.imag) < 1e-5


def test_attention_logits_depend_on_distance_alone() -> None:
    cos, sin = kernels.rotary_tables(40, 16, 10_000.0, "cpu")
    one = randn(1, 1, 1, 16).expand(1, 40, 1, 16)
    q, k = kernels.qk_norm_rope(one, randn(1, 1, 1, 16, seed=1).expand(1, 40, 1, 16), cos, sin)
    scores = (q[0, :, 0] @ k[0, :, 0].T).float()
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


def test_qk_norm_rope_takes_views_tables_per_row_and_groups() -> None:
    cos, sin = kernels.rotary_tables(6, 8, 10_000.0, "cpu")
    qkv = randn(2, 6, 4 + 2 + 2, 8)
    q, k, _ = qkv.split((4, 2, 2), dim=2)
    shared = kernels.qk_norm_rope(q, k, cos, sin)
    per_row = kernels.qk_norm_rope(q.contiguous(), k.contiguous(), cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    assert all(torch.equal(a, b) for a, b in zip(shared, per_row, strict=True))
    assert shared[0].shape == (2, 6, 4, 8)
    assert shared[1].shape == (2, 6, 2, 8)


def test_relu2_mlp_squares_what_is_positive() -> None:
    x, w_fc, w_proj = randn(2, 3, 5), randn(20, 5, seed=1), randn(5, 20, seed=2)
    expected = (x @ w_fc.T).clamp_min(0) ** 2 @ w_proj.T
    torch.testing.assert_close(kernels.relu2_mlp(x, w_fc, w_proj), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_relu2_mlp_is_eager_to_the_last_bit(dtype: torch.dtype, wanted: tuple[bool, ...]) -> None:
    leaves = [randn(7, 9, 32, dtype=dtype), randn(128, 32, dtype=dtype, seed=1), randn(32, 128, dtype=dtype, seed=2)]
    for x, requires in zip(leaves, wanted, strict=True):
        x.requires_grad_(requires)
    asked = [x for x in leaves if x.requires_grad]
    ours, eager = kernels.relu2_mlp(*leaves), relu2_reference(*leaves)
    assert torch.equal(ours, eager)
    g = randn(7, 9, 32, dtype=dtype, seed=3)
    mine, others = (torch.autograd.grad(y, asked, g) for y in (ours, eager))
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def saved_elements(op: Callable[..., Tensor], leaves: list[Tensor]) -> int:
    """Elements of the activations that an op keeps for its backward; weights are there anyway."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = op(*leaves)
    del y
    weights = {w.untyped_storage().data_ptr() for w in leaves[1:]}
    return sum(count for pointer, count in saved.items() if pointer not in weights)


def test_relu2_mlp_saves_half_of_the_hidden_activations() -> None:
    leaves = [
        randn(5, 8).requires_grad_(),
        randn(32, 8, seed=1).requires_grad_(),
        randn(8, 32, seed=2).requires_grad_(),
    ]
    assert saved_elements(relu2_reference, leaves) == 5 * (8 + 32 + 32)
    assert saved_elements(kernels.relu2_mlp, leaves) == 5 * (8 + 32)


def test_relu2_mlp_is_one_graph_and_saves_as_little_in_it() -> None:
    leaves = [
        randn(5, 8).requires_grad_(),
        randn(32, 8, seed=1).requires_grad_(),
        randn(8, 32, seed=2).requires_grad_(),
    ]
    torch._dynamo.reset()
    compiled = torch.compile(kernels.relu2_mlp, fullgraph=True, backend="aot_eager")
    assert saved_elements(compiled, leaves) == 5 * (8 + 32)
    mine, others = (torch.autograd.grad(op(*leaves).sum(), leaves) for op in (compiled, relu2_reference))
    torch.testing.assert_close(mine, others)


def test_relu2_mlp_takes_float32_masters_and_gives_them_float32_gradients() -> None:
    x, w_fc, w_proj = randn(5, 8).bfloat16(), randn(32, 8, seed=1).float(), randn(8, 32, seed=2).float()
    w_fc.requires_grad_()
    y = kernels.relu2_mlp(x, w_fc, w_proj)
    assert torch.equal(y, relu2_reference(x, w_fc.bfloat16(), w_proj.bfloat16()))
    y.sum().backward()
    assert w_fc.grad is not None
    assert w_fc.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "op",
    [
        lambda x: kernels.rms_norm(x),
        lambda x: kernels.add_rms_norm(x, x * 2)[1],
        lambda x: kernels.qk_norm_rope(x, x * 2, *kernels.rotary_tables(3, 4, 10.0, "cpu"))[1],
        lambda x: kernels.relu2_mlp(x.flatten(2), randn(6, 8), randn(8, 6)),
    ],
    ids=["rms_norm", "add_rms_norm", "qk_norm_rope", "relu2_mlp"],
)
def test_gradients(op: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(op, (randn(2, 3, 2, 4).requires_grad_(),))


# ---------------------------------------------------------------------------------------------------------------------
# linear cross-entropy


def by_reference(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str, weights: Tensor | None, **k: object
) -> Tensor:
    losses = reference(x.flatten(0, -2), weight, targets.flatten(), **k).view(targets.shape)  # type: ignore[arg-type]
    row_weights = (targets != k.get("ignore_index", -1)).to(losses.dtype)
    row_weights = row_weights if weights is None else row_weights * weights
    if reduction == "none":
        return losses if weights is None else losses * weights
    total = (losses * row_weights).sum()
    return total if reduction == "sum" else total / row_weights.sum()


def loss_and_gradients(loss: Callable[..., Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(x, weight)
    upstream = randn(*value.shape, seed=9).to(value.dtype)
    value.backward(upstream)
    assert x.grad is not None
    assert weight.grad is not None
    return value.detach(), x.grad, weight.grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [15.0, 60.0, None])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_linear_cross_entropy_is_the_reference(
    reduction: str,
    softcap: float | None,
    z_loss: float,
    weighted: bool,
    compiling: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["vibechat.kernels.linear_cross_entropy"]
    monkeypatch.setattr(module, "FEWEST_ROWS", 1)
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", {True: 1, False: 1})  # chunks of 64 of the 150 rows
    monkeypatch.setattr(module, "_compiling", lambda: compiling)
    x, weight = 3 * randn(3, 50, 8), randn(37, 8, seed=1)
    targets = torch.randint(37, (3, 50), generator=torch.Generator().manual_seed(2))
    targets[:, ::7] = -1
    weights = randn(3, 50, seed=3).abs() if weighted else None
    ours = loss_and_gradients(
        lambda x, w: kernels.linear_cross_entropy(
            x, w, targets, softcap=softcap, z_loss=z_loss, reduction=reduction, token_weights=weights
        ),
        x,
        weight,
    )
    theirs = loss_and_gradients(
        lambda x, w: by_reference(x, w, targets, reduction, weights, softcap=softcap, z_loss=z_loss), x, weight
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-9)
    with torch.no_grad():
        unneeded = kernels.linear_cross_entropy(
            x, weight, targets, softcap=softcap, z_loss=z_loss, reduction=reduction, token_weights=weights
        )
    torch.testing.assert_close(unneeded, ours[0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_gradcheck(reduction: str) -> None:
    targets = torch.tensor([3, -1, 0, 6])
    assert torch.autograd.gradcheck(
        lambda x, w: kernels.linear_cross_entropy(x, w, targets, z_loss=1e-2, reduction=reduction),
        (randn(4, 3).requires_grad_(), randn(7, 3, seed=1).requires_grad_()),
    )


REGIMES = {"tiny": 0.02, "ordinary": 1.0, "saturated": 12.0}


@pytest.mark.parametrize("scale", REGIMES.values(), ids=REGIMES)
@pytest.mark.parametrize("softcap", [15.0, 30.0, 40.0, None])
@pytest.mark.parametrize("compiling", [False, True])
def test_in_bfloat16_it_is_no_worse_than_eager(
    scale: float, softcap: float | None, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vibechat.kernels.linear_cross_entropy"], "_compiling", lambda: compiling)
    x, weight = randn(256, 64, dtype=torch.bfloat16), (randn(512, 64, seed=1) * scale / 8).float()
    targets = torch.randint(512, (256,), generator=torch.Generator().manual_seed(2))
    targets[::9] = -1

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return by_reference(x, w, targets, "mean", None, softcap=softcap)

    truth = loss_and_gradients(eager, x.double(), weight.bfloat16().double())
    theirs = loss_and_gradients(eager, x, weight)
    ours = loss_and_gradients(lambda x, w: kernels.linear_cross_entropy(x, w, targets, softcap=softcap), x, weight)
    assert relative(ours[0], truth[0]) <= 1.5 * relative(theirs[0], truth[0]) + 1e-6
    for mine, other, true in zip(ours[1:], theirs[1:], truth[1:], strict=True):
        assert relative(mine, true) <= 1.5 * relative(other, true)
        assert (mine.double() - true).abs().max() <= 3 * (other.double() - true).abs().max()


def test_nothing_counted_is_zero_not_nan() -> None:
    x, weight = randn(4, 3).requires_grad_(), randn(7, 3).requires_grad_()
    loss = kernels.linear_cross_entropy(x, weight, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.abs().max() == weight.grad.abs().max() == 0


def test_two_backwards_give_the_same_gradient() -> None:
    x, weight = randn(4, 3).requires_grad_(), randn(7, 3).requires_grad_()
    loss = kernels.linear_cross_entropy(x, weight, torch.tensor([1, 2, 3, 4]))
    first = torch.autograd.grad(2 * loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_are_never_all_there(reduction: str, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not forward, not backward, not in evaluation: no tensor is larger than a chunk of 256 of the 1,500 rows."""
    biggest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal biggest
            result = func(*args, **(kwargs or {}))
            biggest = max([biggest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
            return result

    module = sys.modules["vibechat.kernels.linear_cross_entropy"]
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", {True: 1, False: 1})
    monkeypatch.setattr(module, "_compiling", lambda: compiling)
    x, weight = randn(1500, 4, dtype=torch.float32).requires_grad_(), randn(4096, 4, dtype=torch.float32)
    targets = torch.zeros(1500, dtype=torch.long)
    with Watch():
        kernels.linear_cross_entropy(x, weight, targets, reduction=reduction).sum().backward()
        kernels.linear_cross_entropy(x.detach(), weight, targets)
    assert biggest == 256 * 4096


@given(rows=st.integers(1, 10**6), vocab=st.integers(2, 10**6), workspace=st.integers(1, 2**33))
def test_chunks_fit_the_workspace_and_are_even(rows: int, vocab: int, workspace: int) -> None:
    chunk = rows_per_chunk(rows, vocab, 2, workspace)
    assert chunk % 64 == 0
    assert chunk <= max(256, workspace // (2 * vocab)) + 63
    chunks = -(-rows // chunk)
    assert chunks * chunk - rows < 64 * chunks  # no chunk is nearly empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "average"}, "reduction 'average'"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets \(3,\)"),
        ({"weight": torch.zeros(7, 4)}, r"weight \(7, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"x": torch.zeros(4, 3), "weight": torch.zeros(7, 3), "targets": torch.zeros(4).long()}
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(**good | arguments)  # type: ignore[arg-type]


def test_reduction_none_computes_the_logits_again_rather_than_keep_them() -> None:
    x, weight = randn(4, 3).requires_grad_(), randn(7, 3).requires_grad_()
    losses = kernels.linear_cross_entropy(x, weight, torch.tensor([1, 2, 3, 4]), reduction="none")
    node = losses.grad_fn
    while node is not None and not isinstance(node, _GradientsInBackward._backward_cls):  # type: ignore[attr-defined]
        node = node.next_functions[0][0]
    assert node is not None
    assert sum(t.numel() for t in node.saved_tensors) == x.numel() + weight.numel() + 4


# ---------------------------------------------------------------------------------------------------------------------
# the choice


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_decided", {})
    monkeypatch.delenv("VIBECHAT_KERNELS", raising=False)


CPU = torch.device("cpu")


def test_every_op_has_a_row_with_a_reason() -> None:
    table = kernels.backend_table(CPU, torch.float32)
    assert [choice.op for choice in table] == list(kernels.OPS)
    assert all(choice.backend == "torch" and choice.reason for choice in table)


def test_a_kernel_is_taken_where_it_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.bfloat16 else f"not in {dtype}"

    monkeypatch.setitem(backend.triton_refusals, "rms_norm", refusal)
    assert "never measured" in kernels.choose("rms_norm", CPU, torch.bfloat16).reason
    assert kernels.choose("rms_norm", CPU, torch.float32) == ("rms_norm", "torch", "not in torch.float32")
    kernels.set_backend("torch")
    assert kernels.choose("rms_norm", CPU, torch.bfloat16).reason == "asked for"
    kernels.set_backend("torch,rms_norm=triton")
    assert kernels.choose("rms_norm", CPU, torch.bfloat16) == ("rms_norm", "triton", "asked for")
    with pytest.raises(ValueError, match=r"rms_norm=triton cannot run on cpu in torch.float32: not in torch.float32"):
        kernels.choose("rms_norm", CPU, torch.float32)


def test_the_environment_is_asked_once_nothing_else_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIBECHAT_KERNELS", "torch,relu2_mlp=auto")
    assert backend.requested_backend("rms_norm") == "torch"
    assert backend.requested_backend("relu2_mlp") == "auto"


@pytest.mark.parametrize(("spec", "message"), [("cuda", "'cuda' is no backend"), ("auto,rmsnorm=torch", "no op")])
def test_an_unknown_backend_or_op_is_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.set_backend(spec)


def test_triton_alone_means_every_op_that_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(backend.triton_refusals, "newton_schulz", raising=False)
    kernels.set_backend("triton")
    assert backend.requested_backend("rms_norm") == "triton"
    assert kernels.choose("newton_schulz", CPU, torch.float32).reason == "this version has no kernel for it"
    kernels.set_backend("newton_schulz=triton")
    with pytest.raises(ValueError, match="newton_schulz=triton cannot run"):
        kernels.choose("newton_schulz", CPU, torch.float32)


@pytest.mark.parametrize("word", ["triton", "auto", "torch"])
def test_what_is_left_to_the_compiler_says_why_unless_it_is_named(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("rms_norm", "add_rms_norm", "qk_norm_rope"):
        monkeypatch.setitem(backend.triton_refusals, op, lambda device, dtype: None)
    left = {"rms_norm": "it is fused", "add_rms_norm": "it is fused"}
    kernels.set_backend(f"{word},add_rms_norm=triton", left_to_compiler=left)
    assert kernels.choose("rms_norm", CPU, torch.bfloat16) == ("rms_norm", "torch", "it is fused")
    assert kernels.choose("add_rms_norm", CPU, torch.bfloat16) == ("add_rms_norm", "triton", "asked for")
    assert backend.requested_backend("qk_norm_rope") == word
    kernels.set_backend("torch")
    assert kernels.choose("rms_norm", CPU, torch.bfloat16).reason == "asked for"


def test_on_a_cpu_the_reference_is_called_whatever_was_asked_for() -> None:
    kernels.set_backend("triton")
    x = randn(2, 3, 8, dtype=torch.float32).requires_grad_()
    assert "vibechat" not in str(kernels.rms_norm(x).grad_fn).lower()
    with pytest.raises(ValueError, match="rms_norm=triton cannot run on cpu"):
        kernels.choose("rms_norm", CPU, torch.float32)
