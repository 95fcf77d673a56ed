"""The models' shapes that benchmarks and compile gates run at, and the tensors to run them on."""

from typing import NamedTuple

import torch
from torch import Tensor

from vibechat.common import compute_dtype
from vibechat.kernels.language import INTERPRETING

LENGTH = 2048
HEAD_DIM = 128
VOCABULARY = 65_536


class Model(NamedTuple):
    """The sizes of a model of some depth that the ops see."""

    depth: int
    channels: int
    heads: int
    vocabulary: int = VOCABULARY


MODELS = tuple(Model(depth, -(-64 * depth // 128) * 128, -(-64 * depth // 128)) for depth in (12, 20, 26))


class Shape(NamedTuple):
    """A micro-batch of a model."""

    model: Model
    batch: int = 16
    length: int = LENGTH

    @property
    def rows(self) -> int:
        """Tokens."""
        return self.batch * self.length


class Scale(NamedTuple):
    """What a device is measured at."""

    models: tuple[Model, ...]
    """the most valuable first"""
    length: int
    batch: int | None
    """None: each op's own"""


def scale_of(device: torch.device) -> Scale:
    """The models' shapes on a GPU; small ones on a CPU; as small as it gets in Triton's interpreter."""
    if device.type == "cuda":
        return Scale(tuple(reversed(MODELS)), LENGTH, None)
    return Scale((Model(2, 128, 1, 512),), 8, 2) if INTERPRETING else Scale((Model(4, 256, 2, 2048),), 256, 2)


def can_run_kernels(device: torch.device) -> bool:
    """On a GPU, or in the interpreter."""
    return device.type == "cuda" or INTERPRETING


def usual_dtype(device: torch.device) -> torch.dtype:
    """What training computes in there; float32 in the interpreter, whose bfloat16 is wrong."""
    return torch.float32 if INTERPRETING else compute_dtype(device)


class Source:
    """Random tensors of a device and a dtype, the same for the same seed; on "meta" shapes without data."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._rng = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers with this standard deviation."""
        if self._rng is None:
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        numbers = torch.randn(shape, device=self.device, generator=self._rng)
        return (numbers * scale if scale != 1 else numbers).to(dtype or self.dtype)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to below `high`."""
        if self._rng is None:
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(high, shape, device=self.device, generator=self._rng)
