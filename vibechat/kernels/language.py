"""Triton, where it exists, and the few things that every launcher needs around it.

`triton`, `tl` and `TensorDescriptor` are None where Triton is not installed (macOS, Windows); kernels are then not
defined, and backends say so. With $TRITON_INTERPRET=1, decided by Triton when a kernel is decorated, kernels run in its
interpreter on CPU tensors: slow, and what the numerical tests stand on.
"""

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton = _import("triton")
tl = _import("triton.language")
TensorDescriptor: Any = getattr(_import("triton.tools.tensor_descriptor"), "TensorDescriptor", None)
INTERPRETING: bool = triton is not None and bool(triton.knobs.runtime.interpret)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: the width of a block."""
    return 1 << max(0, size - 1).bit_length()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a wide dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's GPU the current one while a kernel is launched, if it is not; Triton launches on the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _nothing


_nothing = contextlib.nullcontext()
