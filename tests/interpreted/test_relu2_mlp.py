"""The ReLU^2 MLP in both of its ways: numbers, layouts, what is saved, how a way is chosen."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.interpreted.numerics import assert_no_worse, randn, shares_of_eagers_error, strided, with_gradients
from vibechat import kernels
from vibechat.kernels import backend, tuning
from vibechat.kernels.language import INTERPRETING
from vibechat.kernels.relu2_mlp import (
    BACKWARD_CONFIGS,
    FLAT_DEFAULT,
    WAYS,
    launch_backward,
    launch_gradient,
    launch_relu2,
    reference,
    way_of,
    with_kernels,
)

if INTERPRETING:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from vibechat.kernels.relu2_mlp import relu2_gradient_in_place, relu2_in_place

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # the interpreter's loops
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
every_way = pytest.mark.parametrize("way", WAYS)
eights = st.integers(1, 9).map(lambda n: 8 * n)


def inputs(N: int, C: int, H: int, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """x (N, C), w_fc (H, C), w_proj (C, H) as a model has them, and the gradient of y (N, C)."""
    sizes, scales = ((N, C), (H, C), (C, H), (N, C)), (1, C**-0.5, H**-0.5, 1)
    numbers = [randn(*size, seed=seed + i) for i, size in enumerate(sizes)]
    *leaves, g = ((scale * x).to(dtype) for x, scale in zip(numbers, scales, strict=True))
    return leaves, g


def by(way: str) -> Callable[..., Tensor]:
    return lambda *leaves: with_kernels(*leaves, way)


@every_way
@settings(max_examples=8)
@given(N=st.integers(1, 150), C=eights, H=eights, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_any_sizes_keep_the_rule(way: str, N: int, C: int, H: int, dtype: torch.dtype) -> None:
    leaves, g = inputs(N, C, H, dtype)
    truth = with_gradients(reference, [x.double() for x in leaves], [g.double()])
    eager = with_gradients(reference, leaves, [g])
    for mine, other, true in zip(with_gradients(by(way), leaves, [g]), eager, truth, strict=True):
        assert_no_worse(mine, other, true)


@every_way
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_and_all_gradients_are_no_worse_than_eagers(way: str, dtype: torch.dtype) -> None:
    """Stricter than the rule: a factor of one. Elementwise makes eager's numbers, fused 0.6 to 0.8 of its error."""
    leaves, g = inputs(203, 136, 264, dtype)
    errors = shares_of_eagers_error(by(way), reference, leaves, g)
    # float16: squares below 2^-14 lose digits, which sways a comparison of equals in the fourth place
    allowed = 0.85 if way == "fused" else 1.0 if dtype == torch.bfloat16 else 1.001
    assert max(errors) <= allowed, [f"{error:.4f}" for error in errors]


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.bfloat16, range(-60, 60)), (torch.float16, range(-7, 7))])
def test_the_root_of_a_rounded_square_is_the_relu_to_the_last_bit(dtype: torch.dtype, exponents: range) -> None:
    """Every number of these binades, so that elementwise adds no error to eager's."""
    eps = torch.finfo(dtype).eps
    significands = torch.arange(1, 2, eps, dtype=torch.float64)
    relu = torch.cat([significands * 2.0**e for e in (exponents[0], -1, 0, exponents[-1])]).to(dtype)
    post = launch_relu2(relu.clone())
    assert torch.equal(post, relu.square())
    assert torch.equal(launch_gradient(torch.ones_like(post), post), 2 * relu)
    assert torch.equal(post.sqrt(), relu)  # what the reference on a CPU relies on


@every_way
def test_gradcheck_in_float64(way: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(5, 6, 10, torch.float64)[0]]
    assert torch.autograd.gradcheck(by(way), leaves, fast_mode=True)


@every_way
def test_opcheck(way: str) -> None:
    leaves, g = inputs(5, 8, 16, torch.float32)
    ops = torch.ops.vibechat
    torch.library.opcheck(ops.relu2_mlp.default, (*(x.requires_grad_() for x in leaves), way))
    post = ops.relu2_mlp(*(x.detach() for x in leaves), way)[1]
    torch.library.opcheck(ops.relu2_mlp_backward.default, (g, leaves[2].detach(), post, way))


@every_way
def test_no_graph_break_and_the_same_numbers_each_time(way: str) -> None:
    leaves, g = inputs(9, 16, 32, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(by(way), fullgraph=True, backend="aot_eager")
    runs = [with_gradients(function, leaves, [g]) for function in (by(way), by(way), compiled)]
    for first, second, in_graph in zip(*runs, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, in_graph)


@every_way
@pytest.mark.parametrize("kind", ["gapped", "padded", "swapped", "expanded", "shifted"])
def test_any_layout_of_any_operand(way: str, kind: str) -> None:
    def other(x: Tensor) -> Tensor:
        if kind == "expanded":
            return x[:1].expand(x.shape)
        if kind == "shifted":  # rows that do not begin at multiples of 16 bytes
            return torch.empty(x.numel() + 3, dtype=x.dtype)[3:].view(x.shape).copy_(x)
        return strided(x, kind)

    leaves, g = inputs(10, 16, 24, torch.bfloat16)
    arranged, upstream = [other(x) for x in leaves], other(g)
    dense = with_gradients(by(way), [x.contiguous() for x in arranged], [upstream.contiguous()])
    for mine, expected in zip(with_gradients(by(way), arranged, [upstream]), dense, strict=True):
        torch.testing.assert_close(mine, expected, atol=0.02, rtol=0.02)  # the matmul library may add up otherwise


@every_way
def test_any_leading_dimensions(way: str) -> None:
    (x, *weights), _ = inputs(12, 8, 16, torch.float64)
    for shape in ((8,), (12, 8), (3, 4, 8), (2, 3, 2, 8), (0, 8), (2, 0, 8)):
        some = x[: torch.Size(shape[:-1]).numel()].reshape(shape)
        ours = with_gradients(by(way), [some, *weights], [torch.ones(shape, dtype=x.dtype)])
        theirs = with_gradients(reference, [some, *weights], [torch.ones(shape, dtype=x.dtype)])
        torch.testing.assert_close(ours, theirs)
    by_time = x.view(3, 4, 8).transpose(0, 1)
    torch.testing.assert_close(by(way)(by_time, *weights), reference(by_time, *weights))


@every_way
def test_what_is_not_finite_stays_so(way: str) -> None:
    """Training looks for it: a NaN that relu hides is a step that should not have been taken."""
    (x, *weights), g = inputs(4, 8, 16, torch.bfloat16)
    x[1], x[2, 0] = torch.nan, torch.inf
    y, dx, *_ = with_gradients(by(way), [x, *weights], [g])
    assert y[1].isnan().all()
    assert dx[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[[0, 3]].isfinite().all()


@every_way
def test_float32_masters_get_float32_gradients(way: str) -> None:
    (x, *weights), g = inputs(9, 16, 32, torch.bfloat16)
    y, dx, *gradients = with_gradients(by(way), [x, *(w.float() for w in weights)], [g])
    expected = with_gradients(by(way), [x, *weights], [g])
    assert torch.equal(y, expected[0])
    assert torch.equal(dx, expected[1])
    for mine, other in zip(gradients, expected[2:], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.bfloat16(), other)


@every_way
def test_only_what_is_asked_for_is_computed(way: str) -> None:
    leaves, g = inputs(9, 16, 32, torch.bfloat16)
    everything = with_gradients(by(way), leaves, [g])[1:]
    flops = {0: 2, 1: 2, 2: 1}  # products of the backward that each gradient needs
    for wanted in range(3):
        asked = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(leaves)]
        y = by(way)(*asked)
        with FlopCounterMode(display=False) as counter:
            (gradient,) = torch.autograd.grad(y, asked[wanted], g)
        assert torch.equal(gradient, everything[wanted])
        assert counter.get_total_flops() == flops[wanted] * 2 * 9 * 16 * 32


@every_way
def test_flops_are_counted_as_the_references_are(way: str) -> None:
    leaves, g = inputs(9, 16, 32, torch.bfloat16)
    counted = []
    for op in (by(way), reference):
        with FlopCounterMode(display=False) as counter:
            with_gradients(op, leaves, [g])
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 12 * 9 * 16 * 32


@every_way
def test_x_and_the_square_are_all_that_is_saved(way: str) -> None:
    leaves, _ = inputs(9, 16, 32, torch.bfloat16)
    leaves = [x.requires_grad_() for x in leaves]
    saved: dict[int, tuple[int, ...]] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = tuple(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = by(way)(*leaves)
    kept = [shape for pointer, shape in saved.items() if pointer not in {w.data_ptr() for w in leaves[1:]}]
    assert sorted(kept) == [(9, 16), (9, 32)]
    del y


# ---------------------------------------------------------------------------------------------------------------------
# the choice, and what the fused way cannot take


@pytest.fixture
def fused_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a device where the fused way was the fastest at these widths."""
    row = {"elementwise": 2.0, "fused": 1.0}
    rows = {"24x96": row, "8x96": row, "12x50": row, "0x8": row}
    table = {"choices": {"relu2_mlp": dict.fromkeys(("bfloat16", "float16", "float32"), rows)}}
    monkeypatch.setattr(tuning, "_table", lambda device: table)
    tuning.tuned_choice.cache_clear()
    yield
    tuning.tuned_choice.cache_clear()


CPU = torch.device("cpu")


def test_without_a_measurement_it_is_elementwise() -> None:
    assert way_of(65_536, 1664, 6656, torch.bfloat16, CPU) == "elementwise"


@pytest.mark.usefixtures("fused_measured")
def test_the_measured_way_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vibechat.kernels.relu2_mlp"], "INTERPRETING", False)
    assert way_of(65_536, 24, 96, torch.bfloat16, CPU) == "fused"
    assert way_of(65_536, 24, 96, torch.float16, CPU) == "fused"
    assert way_of(65_536, 24, 96, torch.float32, CPU) == "elementwise"
    assert way_of(65_536, 32, 128, torch.bfloat16, CPU) == "elementwise"  # never measured
    assert way_of(1, 24, 96, torch.bfloat16, CPU) == "elementwise"  # one token of a conversation
    assert way_of(1, 24, 96, torch.bfloat16, CPU, "fused") == "fused"
    assert way_of(1, 24, 96, torch.float32, CPU, "fused") == "elementwise"
    assert way_of(0, 24, 96, torch.bfloat16, CPU, "fused") == "elementwise"
    assert not backend._said


@pytest.mark.usefixtures("fused_measured")
def test_widths_that_tma_cannot_step_are_named_once() -> None:
    with pytest.warns(UserWarning, match=r"multiples of 8 in torch.bfloat16, not 12 and 50: cuBLAS and") as lines:
        assert [way_of(65_536, 12, 50, torch.bfloat16, CPU) for _ in range(2)] == ["elementwise"] * 2
    assert len(lines) == 1


@pytest.mark.usefixtures("fused_measured")
def test_the_op_takes_the_measured_way_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["vibechat.kernels.relu2_mlp"]
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)
    launched: list[str] = []
    for name in ("launch_forward", "launch_backward", "launch_relu2", "launch_gradient"):
        launch: Callable[..., Any] = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=launch: (launched.append(n), f(*a))[1])
    for C in (8, 16):  # measured, not measured
        leaves, g = inputs(3, C, 96, torch.bfloat16)
        with_gradients(kernels.relu2_mlp, leaves, [g])
    assert launched == ["launch_forward", "launch_backward", "launch_relu2", "launch_gradient"]


# ---------------------------------------------------------------------------------------------------------------------
# 64 bits


def test_elementwise_goes_past_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of a tensor that is too large to interpret whole: its offsets pass 2^31, no argument does."""
    block = FLAT_DEFAULT.block
    program = 2**31 // block + 1
    program_id = InterpreterBuilder.create_get_program_id

    def last(self: Any, axis: int) -> Any:
        handle = program_id(self, axis)
        handle.data = handle.data + np.int32(program)
        return handle

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", last)
    size = program * block + 7
    x, g = (torch.empty(size, dtype=torch.bfloat16) for _ in range(2))  # memory that nobody touches is not there
    end = randn(7).bfloat16()
    x[-7:], g[-7:] = end, 1
    relu2_in_place[(1,)](x, size, BLOCK=block, WIDE=tl.float32)
    assert torch.equal(x[-7:], end.relu().square())
    relu2_gradient_in_place[(1,)](g, x, size, BLOCK=block, WIDE=tl.float32)
    assert torch.equal(g[-7:], 2 * end.relu())


def test_the_fused_backward_reads_a_square_past_2_to_the_31() -> None:
    far = 2**31 + 64
    w_proj, g = randn(16, 16, seed=1).bfloat16(), randn(2, 16).bfloat16()
    post = torch.empty(far + 16, dtype=torch.bfloat16).as_strided((2, 16), (far, 1))
    post.copy_(randn(2, 16, seed=2).square())
    assert torch.equal(launch_backward(g, w_proj, post), launch_backward(g, w_proj, post.clone()))


def test_every_configuration_of_the_backward_gives_the_same() -> None:
    (_, _, w_proj), g = inputs(140, 72, 200, torch.bfloat16)
    post = randn(140, 200, seed=5).square().bfloat16()
    results = [launch_backward(g, w_proj, post, config) for config in BACKWARD_CONFIGS]
    truth = 2 * (g.double() @ w_proj.double()) * post.double().sqrt()
    for result in results:
        assert_no_worse(result, truth.bfloat16(), truth)
