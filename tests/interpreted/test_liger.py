"""Where liger_kernel is installed: the benchmark's calls of it take our arguments and compute what our op computes."""

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.cases import IMPLEMENTATIONS
from bench.ops import OPS, Op
from bench.shapes import Model, Shape, Source
from tests.interpreted.numerics import with_gradients

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger_kernel is not installed"
)
OPS_OF_LIGER = [op for op in OPS.values() if op.liger is not None]


def test_the_suite_asks_for_it() -> None:
    assert "liger" in IMPLEMENTATIONS
    assert {"rms_norm", "add_rms_norm"} <= {op.name for op in OPS_OF_LIGER}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter does otherwise: a float argument is a tensor to a compiled kernel, CUDA's library of
    functions exists, and so do SMs."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    functions = {"rsqrt": lambda x: tl.rsqrt(x), "tanh": lambda x: 2 * tl.sigmoid(2 * x) - 1}
    for op in OPS_OF_LIGER:
        assert op.liger is not None
        op.liger()  # imports it
    for module in [module for name, module in sys.modules.items() if name.startswith("liger_kernel.ops.")]:
        for name in functions.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, functions[name])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("op", OPS_OF_LIGER, ids=lambda op: op.name)
def test_it_computes_the_same(op: Op) -> None:
    assert op.liger is not None
    inputs, upstream, rest = op.inputs(Shape(Model(1, 128, 1, 96), 2, 3), Source("cpu", torch.float32))
    call = op.liger()
    liger = with_gradients(lambda *x: call(*x, *rest), inputs, upstream)
    ours = with_gradients(lambda *x: op.reference(*x, *rest), inputs, upstream)
    assert len(liger) == len(ours)
    for theirs, mine in zip(liger, ours, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)
