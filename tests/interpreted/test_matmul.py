"""The shared matmul in the interpreter: any sizes, both layouts of b, what the hook is given, what is refused."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreted.numerics import assert_no_worse, randn
from vibechat.kernels import matmul
from vibechat.kernels.language import INTERPRETING
from vibechat.kernels.matmul import MatmulConfig, launch, tma_refusal

if INTERPRETING:
    import triton
    import triton.language as tl

    from vibechat.kernels.matmul import rows_of_piece

    @triton.jit
    def scale_and_sum(acc, aux, row, col, M, N, extra):  # type: ignore[no-untyped-def]
        """acc * aux * scale[row]; the sum of each row of this piece goes to partial[row, piece]."""
        scale_ptr, partial_ptr, offset = extra
        width: tl.constexpr = acc.shape[1]
        (r, inside), c = rows_of_piece(acc, row, col, M, N), col + tl.arange(0, width)
        scale = tl.load(scale_ptr + r, mask=inside, other=0.0)
        value = acc * aux.to(tl.float32) * scale[:, None] + offset
        total = tl.sum(tl.where((c < N)[None, :], value, 0.0), 1)
        tl.store(partial_ptr + r.to(tl.int64) * tl.cdiv(N, width) + col // width, total, mask=inside)
        return value

    @triton.jit
    def count_visits(acc, aux, row, col, M, N, extra):  # type: ignore[no-untyped-def]
        r, c = row + tl.arange(0, acc.shape[0])[:, None], col + tl.arange(0, acc.shape[1])[None, :]
        tl.atomic_add(extra[0] + r * N + c, 1, mask=(r < M) & (c < N))
        return acc


SMALL = [MatmulConfig(16, 32, 16, 2, 1, 4, split) for split in (1, 2, 4)]
sizes = st.integers(1, 5).map(lambda eighths: 8 * eighths)
poisoned = pytest.mark.usefixtures("poisoned")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # the interpreter's loops


def padded(x: Tensor) -> Tensor:
    """The same matrix with rows that stand eight elements apart."""
    room = torch.full((x.size(0), x.size(1) + 8), torch.nan, dtype=x.dtype)
    return room[:, : x.size(1)].copy_(x)


@poisoned
@settings(max_examples=25)
@given(
    M=st.integers(1, 50), N=sizes, K=sizes,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float64]),
    b_is_kn=st.booleans(), apart=st.booleans(), config=st.sampled_from(SMALL),
)  # fmt: skip
def test_it_is_the_product(
    M: int, N: int, K: int, dtype: torch.dtype, b_is_kn: bool, apart: bool, config: MatmulConfig
) -> None:
    a, b = randn(M, K, dtype=dtype), randn(*((K, N) if b_is_kn else (N, K)), dtype=dtype, seed=1)
    truth = a.double() @ (b if b_is_kn else b.T).double()
    if apart:
        a, b = padded(a), padded(b)
    result = launch(a, b, b_is_kn=b_is_kn, config=config)
    if dtype == torch.float64:
        torch.testing.assert_close(result, truth)
    else:
        assert_no_worse(result, truth.to(dtype), truth)


@settings(max_examples=15)
@given(M=st.integers(1, 70), N=sizes, group=st.integers(1, 5), config=st.sampled_from(SMALL), sms=st.integers(1, 7))
def test_every_element_is_made_once(M: int, N: int, group: int, config: MatmulConfig, sms: int) -> None:
    visits = torch.zeros(M, N, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "HOPPER_SMS", sms)  # programs that take several tiles each
        config = config._replace(group_m=group)
        result = launch(
            torch.ones(M, 8).half(), torch.ones(N, 8).half(), hook=count_visits, extra=(visits,), config=config
        )
    assert (visits == 1).all()
    assert (result == 8).all()


@poisoned
@pytest.mark.parametrize("config", SMALL, ids=lambda config: f"split={config.split}")
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_the_hook_sees_its_piece_its_rows_and_writes_beside(config: MatmulConfig, out_dtype: torch.dtype) -> None:
    M, N, K = 37, 72, 24
    a, b, aux = randn(M, K).bfloat16(), randn(N, K, seed=1).bfloat16(), randn(M, N, seed=2).bfloat16()
    scale, partial = randn(M, seed=3).float(), torch.empty(M, -(-N // config.piece))
    out = torch.empty(M, N + 8, dtype=out_dtype)
    extra = (scale, partial, 0.25)
    result = launch(a, b, hook=scale_and_sum, aux=padded(aux), extra=extra, out=out[:, :N], config=config)
    assert result.data_ptr() == out.data_ptr()
    assert out[:, N:].isnan().all(), "it wrote past the edge"
    truth = a.double() @ b.double().T * aux.double() * scale.double()[:, None] + 0.25
    assert_no_worse(result, truth.to(out_dtype), truth)
    torch.testing.assert_close(partial.sum(1), truth.sum(1).float(), atol=1e-4, rtol=1e-4)
    pieces = torch.nn.functional.pad(truth, (0, -N % config.piece)).view(M, -1, config.piece).sum(-1)
    torch.testing.assert_close(partial, pieces.float(), atol=1e-4, rtol=1e-4)


def test_rows_may_lie_more_than_2_to_the_31_elements_apart() -> None:
    far = 2**31 + 64
    a = torch.empty(far + 16, dtype=torch.bfloat16).as_strided((2, 16), (far, 1)).copy_(randn(2, 16))
    b = randn(16, 16, seed=1).bfloat16()
    out = torch.empty(far + 16, dtype=torch.bfloat16).as_strided((2, 16), (far, 1))
    near = launch(a.clone(), b, config=SMALL[0])
    assert torch.equal(launch(a, b, out=out, config=SMALL[0]), near)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"a": torch.ones(8, 8).half().T}, "the rows of a are not contiguous"),
        ({"b": torch.ones(8, 12).half()[:, :8]}, "the rows of b do not begin"),
        ({"a": torch.ones(1, 8).half().expand(8, 8)}, "the rows of a do not begin"),
        ({"a": torch.ones(65).half()[1:].view(8, 8)}, "the rows of a do not begin"),
        ({"a": torch.ones(0, 8).half()}, "a is empty"),
        ({"aux": torch.ones(8, 16).half()[:, ::2]}, "the rows of aux are not contiguous"),
        ({"aux": torch.ones(8, 16).half()}, "out and aux must be (8, 8)"),
        ({"out": torch.ones(7, 8).half()}, "out and aux must be (8, 8)"),
        ({"b": torch.ones(8, 16).half()}, "do not fit"),
        ({"b": torch.ones(8, 8)}, "do not fit"),
    ],
)  # fmt: skip
def test_what_tma_cannot_move_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    operands: dict[str, Any] = {"a": torch.ones(8, 8).half(), "b": torch.ones(8, 8).half()} | change
    with pytest.raises(ValueError, match=re.escape(why)):
        launch(operands.pop("a"), operands.pop("b"), **operands, config=SMALL[0])


def test_a_width_of_one_row_or_column_has_no_stride_to_refuse() -> None:
    assert tma_refusal(row=torch.ones(1, 8).half(), padded=torch.ones(4, 16).half()[:, :8]) is None


def test_a_program_never_stands_idle() -> None:
    assert matmul._programs(3, matmul.DEFAULT, torch.device("cpu")) == 3
    assert matmul._programs(10**6, matmul.DEFAULT, torch.device("meta")) == matmul.HOPPER_SMS
    assert matmul._programs(10**6, matmul.DEFAULT._replace(per_sm=2), torch.device("meta")) == 2 * matmul.HOPPER_SMS
