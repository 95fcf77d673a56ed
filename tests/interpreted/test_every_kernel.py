"""What holds for every op with a kernel: gradients, registration, graphs, no copies, honest bytes, 64-bit offsets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.interpreted.numerics import assert_no_worse, randn
from vibechat import kernels
from vibechat.kernels import backend
from vibechat.kernels.cost import Cost, norm_cost, qk_norm_rope_cost
from vibechat.kernels.language import INTERPRETING
from vibechat.kernels.qk_norm_rope import launch_backward as rope_backward
from vibechat.kernels.qk_norm_rope import launch_forward as rope_forward
from vibechat.kernels.qk_norm_rope import reference as rope_reference
from vibechat.kernels.rms_norm import add_reference, reference
from vibechat.kernels.rms_norm import launch_backward as norm_backward
from vibechat.kernels.rms_norm import launch_forward as norm_forward

if INTERPRETING:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from vibechat.kernels.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward
    from vibechat.kernels.rms_norm import rms_norm_backward, rms_norm_forward

COS, SIN = kernels.rotary_tables(3, 8, 100.0, "cpu")
EPS = 2.0**-23


class Case(NamedTuple):
    """A public op, its reference, its custom op and small arguments."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    custom: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    rest: tuple[Tensor, ...] = ()


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    q, k = randn(1, 3, 2, 8, dtype=dtype), randn(1, 3, 1, 8, dtype=dtype, seed=1)
    x, r = q.flatten(2), q.flatten(2).flip(1) * 2
    ops = torch.ops.vibechat
    return {
        "rms_norm": Case(kernels.rms_norm, reference, ops.rms_norm.default, (x,)),
        "add_rms_norm": Case(kernels.add_rms_norm, add_reference, ops.add_rms_norm.default, (r, x)),
        "qk_norm_rope": Case(kernels.qk_norm_rope, rope_reference, ops.qk_norm_rope.default, (q, k), (COS, SIN)),
    }[name]


every_op = pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "qk_norm_rope"])


def leaves(case: Case) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in case.inputs]


@every_op
def test_gradcheck_in_float64(name: str) -> None:
    c = case(name)
    assert torch.autograd.gradcheck(lambda *x: c.op(*x, *c.rest), leaves(c), fast_mode=True)


@every_op
def test_opcheck(name: str) -> None:
    c = case(name, torch.float32)
    torch.library.opcheck(c.custom, (*leaves(c), *c.rest, EPS))


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        *((name, "aot_eager") for name in ("rms_norm", "add_rms_norm", "qk_norm_rope")),
        pytest.param("qk_norm_rope", "inductor", marks=pytest.mark.slow),
    ],
)
def test_no_graph_break_forward_or_backward(name: str, compiler: str) -> None:
    c = case(name, torch.float32)

    def loss(op: Callable[..., Any], *x: Tensor) -> Tensor:
        y = op(*(2 * v for v in x), *c.rest)
        return sum((v.sin() * v).sum() for v in ((y,) if isinstance(y, Tensor) else y))  # type: ignore[return-value]

    torch._dynamo.reset()
    inputs = leaves(c)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    ours = torch.autograd.grad(compiled(c.op, *inputs), inputs)
    theirs = torch.autograd.grad(loss(c.reference, *inputs), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_a_compiled_graph_follows_a_change_of_backend() -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def spy(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(kernels.rms_norm, fullgraph=True, backend=spy)
    x = randn(1, 2, 8)
    with_kernel = compiled(x)
    kernels.set_backend("torch")
    without = compiled(x)
    kernels.set_backend("triton")
    compiled(x)
    assert ["vibechat" in graph for graph in graphs] == [True, False]  # and the third call found the first graph
    torch.testing.assert_close(with_kernel, without)


@every_op
def test_flops_are_counted_as_the_references_are(name: str) -> None:
    c = case(name)
    with FlopCounterMode(display=False) as counter:
        c.op(*c.inputs, *c.rest)
    assert counter.get_total_flops() == 0


@every_op
def test_auto_takes_no_kernel_that_was_not_measured(name: str) -> None:
    kernels.set_backend("auto")
    choice = kernels.choose(name, torch.device("cpu"), torch.float32)
    assert choice.backend == "torch"
    assert "never measured" in choice.reason
    assert not backend.takes_kernel(name, torch.ones(1))


# ---------------------------------------------------------------------------------------------------------------------
# launchers: no copy, honest bytes, 64 bits


class Launch(NamedTuple):
    """A launcher with arguments in awkward layouts, and what it costs."""

    run: Callable[[], Any]
    cost: Cost


def launches() -> dict[str, Launch]:
    qkv = randn(2, 3, 8, 16, dtype=torch.bfloat16)
    q, k, _ = qkv.split((4, 2, 2), dim=2)
    cos, sin = kernels.rotary_tables(3, 16, 100.0, "cpu")
    outputs = rope_forward(q, k, cos, sin, EPS)
    dq, dk = (randn(2, H, 3, 16, dtype=torch.bfloat16).transpose(1, 2) for H in (4, 2))
    x = randn(3, 2, 40, dtype=torch.bfloat16).transpose(0, 1)
    r, dsum, dy = randn(2, 3, 48, dtype=torch.bfloat16)[..., :40], torch.ones(1, dtype=x.dtype).expand(2, 3, 40), x
    rstd = norm_forward(x, None, EPS)[2]
    rows, rope = (6, 40, 2), (2, 3, 6, 16, 2)
    return {
        "rms_norm_forward": Launch(lambda: norm_forward(x, None, EPS), norm_cost(*rows)),
        "add_rms_norm_forward": Launch(lambda: norm_forward(x, r, EPS), norm_cost(*rows, residual=True)),
        "rms_norm_backward": Launch(lambda: norm_backward(dy, None, x, rstd), norm_cost(*rows, backward=True)),
        "add_rms_norm_backward": Launch(
            lambda: norm_backward(dy, dsum, x, rstd), norm_cost(*rows, residual=True, backward=True)
        ),
        "qk_norm_rope_forward": Launch(lambda: rope_forward(q, k, cos, sin, EPS), qk_norm_rope_cost(*rope)),
        "qk_norm_rope_backward": Launch(
            lambda: rope_backward(dq, dk, *outputs, cos, sin), qk_norm_rope_cost(*rope, backward=True)
        ),
    }


LAUNCHES = [
    *("rms_norm_forward", "add_rms_norm_forward", "rms_norm_backward", "add_rms_norm_backward"),
    *("qk_norm_rope_forward", "qk_norm_rope_backward"),
]
every_launch = pytest.mark.parametrize("name", LAUNCHES)


@every_launch
def test_nothing_is_copied(name: str) -> None:
    """The interpreter itself makes views and empty tensors; a copy of an operand would be one of these ops."""
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    launch = launches()[name]
    with Recorder():
        launch.run()
    assert seen
    assert not [op for op in seen if any(word in op for word in ("clone", "contiguous", "_to_copy", "reshape", "cat"))]


@every_launch
def test_it_moves_the_bytes_that_it_claims(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table_bytes: set[int] = set()  # addresses in the float32 tables, which many rows share
    others = 0
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    # tables are float32 and loaded in two dimensions; the statistics are float32 in one

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        nonlocal others
        size = pointers.get_element_ty().primitive_bitwidth // 8
        if size == 4 and pointers.data.ndim == 2:
            table_bytes.update(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].tolist())
        else:
            others += int(np.broadcast_to(mask.data, pointers.data.shape).sum()) * size
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        nonlocal others
        size = pointers.get_element_ty().primitive_bitwidth // 8
        others += int(np.broadcast_to(mask.data, pointers.data.shape).sum()) * size
        return store(self, pointers, value, mask, *rest)

    launch = launches()[name]
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    launch.run()
    assert others + 4 * len(table_bytes) == launch.cost.bytes


FAR = 2**31 + 64  # elements; memory that nobody touches is not really there


def far(*shape: int, seed: int = 0) -> Tensor:
    """(2, ...) in bfloat16 whose second batch element starts more than 2^31 elements after the first."""
    strides = torch.empty(shape).stride()
    room = torch.empty(FAR + torch.Size(shape[1:]).numel(), dtype=torch.bfloat16)
    return room.as_strided(shape, (FAR, *strides[1:])).copy_(randn(*shape, seed=seed))


def test_rms_norm_reads_past_2_to_the_31() -> None:
    x, r = far(2, 2, 16), far(2, 2, 16, seed=1)
    near = x.clone(), r.clone()
    assert all(torch.equal(a, b) for a, b in zip(norm_forward(x, r, EPS), norm_forward(*near, EPS), strict=True))
    rstd = torch.ones(2, 2)
    assert torch.equal(norm_backward(x, r, r, rstd), norm_backward(near[0], near[1], near[1], rstd))


def test_qk_norm_rope_reads_past_2_to_the_31() -> None:
    q, k = far(2, 3, 2, 8), far(2, 3, 1, 8, seed=1)
    near = rope_forward(q.clone(), k.clone(), COS, SIN, EPS)
    assert all(torch.equal(a, b) for a, b in zip(rope_forward(q, k, COS, SIN, EPS), near, strict=True))
    mine, expected = rope_backward(q, k, *near, COS, SIN), rope_backward(q.clone(), k.clone(), *near, COS, SIN)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.fixture
def later_programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let a grid of few programs be the last ones of a grid that is too large to interpret."""
    program_id = InterpreterBuilder.create_get_program_id

    def shift(by: int) -> None:
        def later(self: Any, axis: int) -> Any:
            handle = program_id(self, axis)
            handle.data = handle.data + np.int32(by)
            return handle

        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", later)

    return shift


@pytest.mark.parametrize("along", ["batch", "time"])
def test_rms_norm_goes_past_2_to_the_31_in_32_bit_steps(later_programs: Callable[[int], None], along: str) -> None:
    """No stride and no index passes 2^31, their product does: 32-bit offsets would wrap."""
    C, last = 4096, randn(1, 1, 4096, dtype=torch.bfloat16)
    row = 2**31 // C + 1
    x, y, dx = (torch.empty(row * C + C, dtype=torch.bfloat16) for _ in range(3))
    x[row * C :] = last.flatten()
    rstd = torch.empty(row + 1)
    T, strides = (1, (C, 0, 1)) if along == "batch" else (row + 1, (0, C, 1))
    later_programs(row)
    constants = {"ROWS": 1, "BLOCK": C, "WIDE": tl.float32}
    rms_norm_forward[(1,)](x, None, None, y, rstd, T, C, EPS, *strides, *strides, **constants)
    assert_no_worse(y[row * C :], reference(last).flatten(), reference(last.double()).flatten())
    rms_norm_backward[(1,)](x, x, x, rstd, dx, T, C, *strides * 3, **constants)
    later_programs(0)
    assert torch.equal(dx[row * C :], norm_backward(last, last, last, rstd[row:].view(1, 1)).flatten())


@pytest.mark.parametrize("along", ["batch", "time"])
def test_qk_norm_rope_goes_past_2_to_the_31_in_32_bit_steps(later_programs: Callable[[int], None], along: str) -> None:
    D, last = 1024, randn(1, 1, 1, 1024, dtype=torch.bfloat16)
    cos, sin = (table[1:] for table in kernels.rotary_tables(2, D, 100.0, "cpu"))
    row = 2**31 // D + 1
    x, y, grad = (torch.empty(row * D + D, dtype=torch.bfloat16) for _ in range(3))
    x[row * D :] = last.flatten()
    rstd = torch.empty(row + 1)
    near = rope_forward(last, last, cos, sin, EPS)
    constants = {"ROWS": 1, "HALF": D // 2, "WIDE": tl.float32}
    sizes, strides = ((row + 1, 1), (D, 0, 0, 1)) if along == "batch" else ((1, row + 1), (0, D, 0, 1))
    layout = (*strides, *strides, 0, 0, 1)  # of q, of k, of the tables, which have one row for all
    for side in range(2):  # as the last row of q; as the last row of k, which comes after all of q's
        later_programs(row + side * (row + 1))
        qk_norm_rope_forward[(1,)](x, x, y, y, rstd, rstd, cos, sin, *sizes, 1, 1, D, EPS, *layout, **constants)
        assert torch.equal(y[row * D :], near[0].flatten())
        qk_norm_rope_backward[(1,)](
            x, x, y, y, rstd, rstd, grad, grad, cos, sin, *sizes, 1, 1, D, *layout, **constants
        )  # fmt: skip
        later_programs(0)
        assert torch.equal(grad[row * D :], rope_backward(last, last, *near, cos, sin)[0].flatten())
        y[row * D :] = grad[row * D :] = torch.nan
