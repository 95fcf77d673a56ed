"""The models' shapes that benchmarks and compile gates run at, and the launches of every kernel at them."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vibechat.kernels.tuning import Config

LENGTH = 2048
HEAD_DIM = 128


class Model(NamedTuple):
    """The sizes of a model of some depth that the ops see."""

    depth: int
    channels: int
    heads: int


MODELS = tuple(Model(depth, -(-64 * depth // 128) * 128, -(-64 * depth // 128)) for depth in (12, 20, 26))


class Launch(NamedTuple):
    """One kernel at one shape, to be launched with a configuration."""

    kernel: str
    width: int
    """lanes of a block: what the tuned configuration is looked up by"""
    configs: tuple[Config, ...]
    run: Callable[[Config | None], Any]


def launches(model: Model, batch: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[Launch]:
    """Every kernel at a model's shapes, on operands laid out as the model lays them out: q and k are views of one
    packed projection, their gradients come from attention as (B, H, T, D)."""
    norm = importlib.import_module("vibechat.kernels.rms_norm")
    rope = importlib.import_module("vibechat.kernels.qk_norm_rope")
    eps = norm.EPS

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device) if device == "meta" else _random(shape, dtype, device)

    B, T, C, H, D = batch, LENGTH, model.channels, model.heads, HEAD_DIM
    x, r, dy, dsum = (make(B, T, C) for _ in range(4))
    rstd = make(B, T, dtype=torch.float32)
    block = 1 << (C - 1).bit_length()
    forward, backward = norm.launch_forward, norm.launch_backward
    yield Launch("rms_norm_forward", block, norm.CONFIGS, lambda c: forward(x, None, eps, c))
    yield Launch("add_rms_norm_forward", block, norm.CONFIGS, lambda c: forward(x, r, eps, c))
    yield Launch("rms_norm_backward", block, norm.CONFIGS, lambda c: backward(dy, None, x, rstd, c))
    yield Launch("add_rms_norm_backward", block, norm.CONFIGS, lambda c: backward(dy, dsum, x, rstd, c))
    q, k, _ = make(B, T, 3 * H, D).split((H, H, H), dim=2)
    cos, sin = (make(T, D // 2, dtype=torch.float32) for _ in range(2))
    outputs = *(make(B, T, H, D) for _ in range(2)), *(make(B, T, H, dtype=torch.float32) for _ in range(2))
    dq, dk = (make(B, H, T, D).transpose(1, 2) for _ in range(2))
    yield Launch("qk_norm_rope_forward", D // 2, rope.CONFIGS, lambda c: rope.launch_forward(q, k, cos, sin, eps, c))
    yield Launch(
        "qk_norm_rope_backward", D // 2, rope.CONFIGS, lambda c: rope.launch_backward(dq, dk, *outputs, cos, sin, c)
    )


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
