"""What tests/gpu asks of a GPU, asked of the interpreter at small sizes: seen to pass, and to fail when a kernel is
wrong. Synchronization, CUDA graphs and 2^31 elements need the GPU itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.ops import Op
from bench.shapes import Model, Shape
from tests.gpu import checks
from vibechat import kernels
from vibechat.kernels import backend

CPU = torch.device("cpu")
SMALL = Shape(Model(1, 128, 1, 96), 2, 3)
SIZES = {"sequence_len": 6, "vocab_size": 96, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 128}
every_op = pytest.mark.parametrize("op", checks.QUESTIONED, ids=lambda op: op.name)


@pytest.fixture(autouse=True)
def insisting() -> None:
    kernels.set_backend(checks.KERNELS)


@every_op
def test_every_question_about_an_op(op: Op) -> None:
    checks.keeps_the_rule(op, SMALL, CPU, torch.bfloat16)
    checks.repeats_to_the_last_bit(op, SMALL, CPU)
    checks.leaves_its_inputs_alone(op, SMALL, CPU)
    checks.compiles_whole(op, SMALL, CPU, "aot_eager")
    assert not backend._said, "plain PyTorch ran instead of a kernel"
    assert kernels.choose(op.backend_name, CPU, torch.float32).backend == "triton"


def off_by_a_little(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrong at one element by half of it: what the L2 error alone might hide."""

    def wrong(*arguments: Any) -> Any:
        first, *others = checks.tensors(op(*arguments))
        factor = torch.ones_like(first)
        factor.view(-1)[-1] = 1.5
        return (first * factor, *others)

    return wrong


@every_op
def test_a_wrong_element_is_noticed(op: Op) -> None:
    with pytest.raises(AssertionError, match="error"):
        checks.keeps_the_rule(dataclasses.replace(op, public=off_by_a_little(op.public)), SMALL, CPU, torch.bfloat16)


def test_the_model_trains_with_every_kernel() -> None:
    with_kernels, plain = (
        checks.final_loss(spec, CPU, torch.bfloat16, 0, SIZES, steps=2, batch=2) for spec in (checks.KERNELS, "torch")
    )
    assert with_kernels == pytest.approx(plain, rel=0.02)
    assert not backend._said


@pytest.mark.parametrize("distance", [0.04, 0.06])
def test_training_that_ends_elsewhere_is_noticed(distance: float) -> None:
    """Eager ends 0.1 from float32 with each of three seeds, so that 0.15 is what kernels may."""
    seeds: list[int] = []

    def train(spec: str, device: torch.device, dtype: torch.dtype, seed: int, *_: Any) -> float:
        seeds.append(seed)
        return 3.0 - (0.1 if dtype == torch.bfloat16 else 0.0) - (distance if spec == checks.KERNELS else 0.0)

    if distance < 0.05:
        checks.trains_as_eager_does(CPU, SIZES, train=train)
        assert seeds == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    else:
        with pytest.raises(AssertionError, match=r"kernels 2\.84"):
            checks.trains_as_eager_does(CPU, SIZES, train=train)


def test_gradients_of_a_whole_model() -> None:
    checks.model_gradients_keep_the_rule(CPU, SIZES)
