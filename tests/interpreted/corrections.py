"""Make Triton's interpreter right for bfloat16, and for scalars. Importing this patches it; do so before a kernel runs.

The interpreter holds a bfloat16 as its 16 raw bits in an unsigned integer. Its casts cut the mantissa off, its
arithmetic works on the bits as if they were integers, and its dot products are of those integers: all of it silent.
Here casts round to nearest even, and arithmetic and dots go through float32, rounding the result as hardware does.

A scalar is an array of one element there, of which Triton 3.6 takes int() where an index is wanted: numpy warns of that
thousands of times in a run, and refuses it from 2.4 on. Here it is the element, as later versions of Triton have it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
Bits = np.ndarray[Any, np.dtype[np.uint16]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


def floats(bits: Bits) -> Floats:
    """The values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits(values: Any) -> Bits:
    """float32 values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    raw = values.view(np.uint32)
    rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _as_float32(handle: Any) -> Any:
    return Handle(floats(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _install() -> None:
    convert, dot = interpreter._convert_float, Builder.create_dot
    binary, cast = Builder.binary_op, Builder.cast_impl
    patch_tensor = interpreter._patch_lang_tensor

    def right_convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return bits(values).reshape(np.shape(values))
        if (source, target) == (tl.bfloat16, tl.float32):
            return floats(values).view(np.uint32).reshape(np.shape(values))
        return convert(values, source, target, rounding)

    def right_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, _as_float32(a), _as_float32(b), accumulator, precision, imprecise)

    def right_binary(self: Any, left: Any, right: Any, operation: Callable[[Any, Any], Any]) -> Any:
        if not (_is_bfloat16(left) and _is_bfloat16(right)):
            return binary(self, left, right, operation)
        result = operation(floats(left.data), floats(right.data))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(bits(result), tl.bfloat16)

    def right_cast(self: Any, source: Any, target: Any) -> Any:
        start, end = source.dtype.scalar, target.scalar
        if start == tl.bfloat16 and end not in (tl.bfloat16, tl.float32):
            return cast(self, _as_float32(source), target)
        if end == tl.bfloat16 and start not in (tl.bfloat16, tl.float32):
            return Handle(bits(source.data.astype(np.float32)), end)
        return cast(self, source, target)

    def right_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float, interpreter._patch_lang_tensor = right_convert, right_tensor
    Builder.create_dot, Builder.binary_op, Builder.cast_impl = right_dot, right_binary, right_cast
    Builder.get_bf16 = lambda self, value: Handle(bits([value]), tl.bfloat16)  # for `other=` of a load


_install()
