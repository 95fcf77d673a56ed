"""The bytes and FLOPs that an op's docstring claims are the ones that benchmarks report against."""

import importlib
import re

import pytest

from vibechat.kernels.cost import (
    loss_cost,
    loss_designs,
    newton_schulz_cost,
    newton_schulz_flops,
    norm_cost,
    qk_norm_rope_cost,
    relu2_mlp_cost,
)


def claimed(op: str, backward: bool) -> int:
    """Passes over the op's tensors, as its docstring says: "op  forward 2 N C b + ...  backward 3 N C b + ..."."""
    text = importlib.import_module(f"vibechat.kernels.{op.removeprefix('add_')}").__doc__
    found = re.search(rf"^ +{op} +forward (\d) N .*? backward (\d) N ", text, re.MULTILINE)
    assert found is not None
    return int(found[1 + backward])


def flops_claimed(file: str, backward: bool) -> int:
    text = importlib.import_module(f"vibechat.kernels.{file}").__doc__
    found = re.search(r"FLOPs: (\d+) N.*? forward and (\d+) N", text)
    assert found is not None
    return int(found[1 + backward])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_norms(op: str, backward: bool) -> None:
    residual = op == "add_rms_norm"
    cost = norm_cost(100, 64, 2, residual=residual, backward=backward)
    assert cost.bytes == claimed(op, backward) * 100 * 64 * 2 + 4 * 100
    assert cost.flops == (flops_claimed("rms_norm", backward) + residual) * 100 * 64


@pytest.mark.parametrize("backward", [False, True])
def test_qk_norm_rope(backward: bool) -> None:
    cost = qk_norm_rope_cost(3, 5, 6, 16, 2, backward=backward)
    elements = 3 * 5 * 6 * 16
    tables = 8 * 5 * 16 // 2
    assert cost.bytes == claimed("qk_norm_rope", backward) * elements * 2 + 4 * elements // 16 + tables
    assert cost.flops == flops_claimed("qk_norm_rope", backward) * elements


@pytest.mark.parametrize("backward", [False, True])
def test_relu2_mlp(backward: bool) -> None:
    text = importlib.import_module("vibechat.kernels.relu2_mlp").__doc__
    assert text is not None
    forward = re.search(r"forward (\d) b \(N C \+ N H \+ C H\)", text)
    gradients = re.search(r"backward b \((\d) N C \+ (\d) N H \+ (\d) C H\)", text)
    flops = re.search(r"FLOPs: forward (\d) N C H, backward (\d) N C H", text)
    assert forward is not None
    assert gradients is not None
    assert flops is not None
    N, C, H = 100, 8, 24
    outer, inner, weights = map(int, gradients.groups() if backward else forward.groups() * 3)
    cost = relu2_mlp_cost(N, C, H, 2, backward=backward)
    assert cost.bytes == 2 * (outer * N * C + inner * N * H + weights * C * H)
    assert cost.flops == int(flops[1 + backward]) * N * C * H
    assert "2 b N H more in each pass for elementwise" in text
    assert relu2_mlp_cost(N, C, H, 2, backward=backward, fused=False).bytes == cost.bytes + 2 * 2 * N * H


def test_at_the_shapes_of_a_d26_step() -> None:
    """65,536 rows of 1,664 channels in bfloat16: one pass is 208 MiB."""
    one = 65_536 * 1664 * 2
    assert norm_cost(65_536, 1664, 2).bytes == 2 * one + 4 * 65_536
    assert norm_cost(65_536, 1664, 2, residual=True, backward=True).bytes == 4 * one + 4 * 65_536
    rope = qk_norm_rope_cost(32, 2048, 26, 128, 2)
    assert 4 * one < rope.bytes < 4.05 * one


def test_the_loss_touches_a_logit_five_times_in_three_matmuls() -> None:
    """Of 65,536 tokens at d26 a logit is written, read, written as the factor, and read by two matmuls."""
    N, D, V = 65_536, 1664, 65_536
    evaluation, training = (loss_cost(N, D, V, 2, training=training) for training in (False, True))
    assert training.flops == 3 * evaluation.flops == 3 * 2 * N * D * V
    touched = training.bytes / (N * V)
    assert 5 * 2 < touched < 1.55 * 5 * 2, "the rest is the weight, and its gradient's accumulation, once a chunk"
    assert loss_cost(N, D, V, 2, training=True, fused=True).bytes == training.bytes - 2 * 2 * N * V


def test_designs_of_the_loss_differ_as_they_should() -> None:
    ours, fused, liger, recomputing = loss_designs(65_536, 1664, 65_536).values()
    assert ours.flops == fused.flops == liger.flops == recomputing.flops * 3 // 4
    assert recomputing.bytes < fused.bytes < ours.bytes < liger.bytes


def test_the_docstring_s_bytes_of_the_loss() -> None:
    text = importlib.import_module("vibechat.kernels.linear_cross_entropy_triton").__doc__ or ""
    found = re.search(r"chunks of R rows: (\d) N V b .*?for each chunk (\d) V D b .*? and (\d) V D to", text, re.DOTALL)
    assert found is not None
    logits, weights, accumulation = map(int, found.groups())
    N, D, V, chunks = 64 * 4096, 8, 2**20, 64  # so many words that x is nothing
    counted = logits * N * V * 2 + chunks * V * D * (weights * 2 + accumulation)
    assert loss_cost(N, D, V, 2, training=True).bytes == pytest.approx(counted, rel=0.001)


def test_newton_schulz_flops_are_the_known_multiples_of_d_cubed() -> None:
    def multiple(m: int, n: int, symmetric: bool, restarts: int = -1) -> float:
        return newton_schulz_flops(3, m, n, symmetric=symmetric, restarts=restarts) / (3 * m**3)

    assert [multiple(8, 8, symmetric) for symmetric in (False, True)] == [30, 20]
    assert [multiple(8, 32, symmetric) for symmetric in (False, True)] == [90, 65]
    assert [multiple(8, 32, symmetric, 1) for symmetric in (False, True)] == [60, 38]
    assert [multiple(8, 32, symmetric, 2) for symmetric in (False, True)] == [70, 47]
    assert newton_schulz_cost(2, 8, 32, 2).flops == 2 * 38 * 8**3
    assert newton_schulz_cost(2, 8, 8, 2).flops == 2 * 20 * 8**3
    assert newton_schulz_cost(1, 8, 8, 4).bytes > newton_schulz_cost(1, 8, 8, 2).bytes
