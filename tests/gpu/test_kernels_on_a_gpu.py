"""Every op of bench.ops on a real GPU at real shapes: the rule, bitwise determinism, no waiting, one graph, training.

`pytest -m gpu` runs them; where there is no GPU they are skipped and counted.
"""

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch

from bench.ops import OPS, Op
from bench.shapes import MODELS, Model, Shape, Source
from tests.gpu import checks
from tests.interpreted.numerics import check, shares_of_eagers_error
from vibechat import kernels
from vibechat.kernels import backend
from vibechat.kernels.qk_norm_rope import reference as rope_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
relu2_mlp = importlib.import_module("vibechat.kernels.relu2_mlp")  # the package's attribute is the op
GPU = torch.device("cuda")
D12, D20, D26 = MODELS
RAGGED = Model(1, 256, 2, 1000)
SHAPES = [Shape(D26, 2), Shape(D20, 2), Shape(D12, 4), Shape(D26, 3, 1023), Shape(RAGGED, 5, 33), Shape(RAGGED, 1, 1)]
every_op = pytest.mark.parametrize("op", checks.QUESTIONED, ids=lambda op: op.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_decided", {})
    monkeypatch.setattr(backend, "_said", set())
    kernels.set_backend(checks.KERNELS)
    yield
    torch.cuda.empty_cache()


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"d{s.model.depth}-{s.batch}x{s.length}")
@every_op
def test_it_keeps_the_rule(op: Op, shape: Shape, dtype: torch.dtype) -> None:
    if refusal := backend.triton_refusals[op.backend_name](GPU, dtype):
        pytest.skip(refusal)
    checks.keeps_the_rule(op, shape, GPU, dtype)
    assert shape.model == RAGGED or not backend._said, "plain PyTorch ran instead of a kernel"


@every_op
def test_two_runs_are_equal_to_the_last_bit(op: Op) -> None:
    checks.repeats_to_the_last_bit(op, SHAPES[0], GPU)


@every_op
def test_inputs_are_left_as_they_were(op: Op) -> None:
    checks.leaves_its_inputs_alone(op, SHAPES[3], GPU)


@every_op
def test_the_host_never_waits(op: Op) -> None:
    run = checks.passes(op, SHAPES[0], GPU)
    run()  # compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_it_can_be_captured_in_a_graph(op: Op) -> None:
    run = checks.passes(op, SHAPES[0], GPU)
    expected = [x.detach().clone() for x in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@every_op
def test_compiled_without_a_break(op: Op) -> None:
    checks.compiles_whole(op, Shape(RAGGED, 2, 16), GPU, "inductor")


def test_offsets_pass_2_to_the_31() -> None:
    rows = 2**31 // 1664 + 1000
    x = Source(GPU).randn(1, 1000, 1664).expand(-(-rows // 1000), -1, -1).contiguous()
    y = kernels.rms_norm(x)
    assert torch.equal(y[-1], y[0])
    del x, y
    heads = 2**31 // (2048 * 128) // 13 + 1
    q = Source(GPU).randn(1, 2048, 13, 128).expand(heads, -1, -1, -1).contiguous()
    turned = kernels.qk_norm_rope(q, q[:, :, :1], *kernels.rotary_tables(2048, 128, 10_000.0, GPU))[0]
    assert torch.equal(turned[-1], turned[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", relu2_mlp.WAYS)
def test_relu2_mlp_is_no_worse_than_eager(way: str, dtype: torch.dtype) -> None:
    op = OPS["relu2_mlp"]
    leaves, (upstream,), _ = op.inputs(SHAPES[3], Source(GPU, dtype))
    errors = shares_of_eagers_error(op.ways[way], op.reference, leaves, upstream)
    assert max(errors) <= (0.85 if way == "fused" else 1.002), errors  # cuBLAS may add up in another order


@pytest.mark.parametrize("way", relu2_mlp.WAYS)
def test_relu2_mlp_keeps_half_of_the_hidden_activations(way: str) -> None:
    op, shape = OPS["relu2_mlp"], SHAPES[0]
    leaves = [x.requires_grad_() for x in op.inputs(shape, Source(GPU)).leaves]

    def kept(call: Callable[..., torch.Tensor]) -> int:
        call(*leaves)  # the first matmul of a process makes room for cuBLAS
        before = torch.cuda.memory_allocated()
        y = call(*leaves)
        return torch.cuda.memory_allocated() - before - y.nbytes

    hidden = 2 * shape.rows * 4 * shape.model.channels
    assert kept(op.reference) == pytest.approx(2 * hidden, rel=0.01)
    assert kept(op.ways[way]) == pytest.approx(hidden, rel=0.01)


def test_relu2_mlp_passes_2_to_the_31() -> None:
    C, H = 128, 4096
    rows = 2**31 // H + 1000
    leaves, (g,), _ = OPS["relu2_mlp"].inputs(Shape(Model(1, C, 1), 1, 1000), Source(GPU))
    w_fc, w_proj = leaves[1].repeat(H // (4 * C), 1), leaves[2].repeat(1, H // (4 * C))
    x, g = (t.view(1000, C).repeat(-(-rows // 1000), 1) for t in (leaves[0], g))
    fused = relu2_mlp.launch_forward(x, w_fc)
    plain = relu2_mlp.launch_relu2(x @ w_fc.T)
    for post in (fused, plain):
        assert torch.equal(post[-1000:], post[:1000])
    torch.testing.assert_close(fused[-1000:], plain[-1000:], atol=0.02, rtol=0.02)
    del plain
    gradients = relu2_mlp.launch_backward(g, w_proj, fused), relu2_mlp.launch_gradient(g @ w_proj, fused)
    for dpre in gradients:
        assert torch.equal(dpre[-1000:], dpre[:1000])


@every_dtype
@pytest.mark.parametrize(("B", "T", "H", "K"), [(2, 2048, 12, 4), (2, 1001, 10, 5), (8, 1, 6, 2)])
def test_qk_norm_rope_with_fewer_heads_of_k(B: int, T: int, H: int, K: int, dtype: torch.dtype) -> None:
    q, k, _ = Source(GPU, dtype).randn(B, T, H + 2 * K, 128).split((H, K, K), dim=2)
    cos, sin = kernels.rotary_tables(T, 128, 10_000.0, GPU)
    dq, dk = (Source(GPU, dtype, 1).randn(B, heads, T, 128).transpose(1, 2) for heads in (H, K))
    check(
        lambda q, k: kernels.qk_norm_rope(q, k, cos, sin), lambda q, k: rope_reference(q, k, cos, sin), [q, k], [dq, dk]
    )


def test_model_gradients_keep_the_rule() -> None:
    sizes = {"sequence_len": 512, "vocab_size": 1024, "n_layer": 2, "n_head": 6, "n_kv_head": 6, "n_embd": 768}
    checks.model_gradients_keep_the_rule(GPU, sizes)


@pytest.mark.slow
def test_training_ends_where_float32_ends() -> None:
    checks.trains_as_eager_does(GPU, checks.SMALL)
