"""rms_norm and add_rms_norm as rows of the benchmark."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.ops.entry import Inputs, Launch, Op
from bench.shapes import Shape, Source
from vibechat import kernels
from vibechat.kernels.cost import Cost, norm_cost
from vibechat.kernels.language import power_of_two
from vibechat.kernels.rms_norm import (
    CONFIGS,
    EPS,
    add_reference,
    default_config,
    launch_backward,
    launch_forward,
    reference,
)


def _inputs(count: int) -> Callable[[Shape, Source], Inputs]:
    def make(shape: Shape, source: Source) -> Inputs:
        sizes = shape.batch, shape.length, shape.model.channels
        return Inputs([source.randn(*sizes) for _ in range(count)], [source.randn(*sizes) for _ in range(count)])

    return make


def _cost(residual: bool) -> Callable[[Shape, int, bool], Cost]:
    return lambda shape, itemsize, backward: norm_cost(
        shape.rows, shape.model.channels, itemsize, residual=residual, backward=backward
    )


def _launches(residual: bool) -> Callable[[Shape, Source], Iterator[Launch]]:
    op = "add_rms_norm" if residual else "rms_norm"

    def launches(shape: Shape, source: Source) -> Iterator[Launch]:
        sizes = shape.batch, shape.length, shape.model.channels
        x, r, dy, dsum = (source.randn(*sizes) for _ in range(4))
        rstd = source.randn(*sizes[:2], dtype=torch.float32)
        block = power_of_two(sizes[-1])
        for kernel, run in (
            (f"{op}_forward", lambda c: launch_forward(x, r if residual else None, EPS, c)),
            (f"{op}_backward", lambda c: launch_backward(dy, dsum if residual else None, x, rstd, c)),
        ):
            wide = ("wide_loads", "wide_stores")
            yield Launch(kernel, str(block), CONFIGS, run, default_config(block), needs=wide)

    return launches


def _liger_rms_norm() -> Callable[..., Any]:
    norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction

    def call(x: Tensor) -> Any:
        return norm.apply(x, None, EPS, 0.0, "gemma", False)  # no gain, all in float32, dy left alone

    return call


def _liger_add_rms_norm() -> Callable[..., Any]:
    norm = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction

    def call(residual: Tensor, x: Tensor) -> Any:
        gain = torch.ones(x.size(-1), dtype=x.dtype, device=x.device)  # it has no form without one
        return tuple(reversed(norm.apply(x, residual, gain, EPS, 0.0, "gemma", False)))

    return call


RMS_NORM = Op(
    "rms_norm", kernels.rms_norm, reference, _inputs(1), _cost(False), _launches(False), liger=_liger_rms_norm
)
ADD_RMS_NORM = Op(
    "add_rms_norm",
    kernels.add_rms_norm,
    add_reference,
    _inputs(2),
    _cost(True),
    _launches(True),
    liger=_liger_add_rms_norm,
)
