"""What was measured on a device: the best configuration of each kernel, the best of several ways to compute an op, and
whether its kernel beats plain PyTorch.

One JSON file per device, shipped in `tuned/` (so that training never waits for autotuning) or written by
`python -m bench.tune` to `$VIBECHAT_BASE_DIR/kernels/`, which wins. It holds seconds, and what is chosen follows:

    {"configs": {"rms_norm_forward": {"2048": {"rows": 1, "warps": 4}}},           kernel -> key -> the fastest
     "choices": {"relu2_mlp": {"bfloat16": {"4096x1664": {"fused": s, "elementwise": s}}}},        op -> dtype -> key
     "ops": {"rms_norm": {"bfloat16": {"d26": {"kernel": s, "eager": s, "compiled": s}}}}, ...}    both passes

A configuration is a NamedTuple of integers, one class for a family of kernels; a key is a string that the launcher
computes from the shapes, coarse enough that the shapes that were measured stand for those near them. A kernel declares
at most six configurations, all of which tests compile, and takes no other from a file: a row of another version is
as good as none. Without a row the launcher's default runs, and `auto` takes no kernel.
"""

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

SHIPPED = Path(__file__).parent / "tuned"
MOST_CONFIGS = 6  # that a kernel declares: each is compiled in the tests, and timed on every new device


class RowConfig(NamedTuple):
    """How a row kernel is launched."""

    rows: int
    """rows a program computes"""
    warps: int
    """warps of a program"""


class FlatConfig(NamedTuple):
    """How an elementwise kernel is launched."""

    block: int
    """elements a program takes at a time"""
    warps: int
    """of a program"""


AnyConfig = TypeVar("AnyConfig", bound=tuple[int, ...])


class Measured(NamedTuple):
    """Seconds of an op, forward and backward, at one shape; infinite where memory did not suffice."""

    kernel: float
    eager: float
    compiled: float


class Verdict(NamedTuple):
    """How many times as fast as plain PyTorch a kernel is: where it gains least, and where it gains most."""

    against_eager: tuple[float, float]
    against_compiled: tuple[float, float]

    @property
    def kernel_wins(self) -> bool:
        """Whether the kernel is faster than both at every shape that was measured."""
        return min(self.against_eager[0], self.against_compiled[0]) > 1


def device_slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"nvidia|amd", "", name.lower())).strip("-")


def cached_file(slug: str) -> Path:
    """Where measurements made on this machine stand."""
    base = os.environ.get("VIBECHAT_BASE_DIR") or Path.home() / ".cache" / "vibechat"
    return Path(base) / "kernels" / f"{slug}.json"


def read_table(slug: str) -> dict[str, Any]:
    """The measurements of a device, this machine's own before the shipped ones; empty if there are none.

    Raises:
        ValueError: naming a file that is damaged.
    """
    for file in (cached_file(slug), SHIPPED / f"{slug}.json"):
        if file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                advice = "delete it, or measure again with python -m bench.tune"
                raise ValueError(f"kernels: {file} holds no measurements ({error}): {advice}") from None
    return {}


@functools.cache
def _table(device: torch.device) -> dict[str, Any]:
    return read_table(device_slug(torch.cuda.get_device_name(device))) if device.type == "cuda" else {}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def verdict(op: str, device: torch.device, dtype: torch.dtype) -> Verdict | None:
    """What was measured of an op on this device, or None if nobody timed it there."""
    rows = [Measured(**row) for row in _table(device).get("ops", {}).get(op, {}).get(_name(dtype), {}).values()]
    if not rows:
        return None
    eager, compiled = (
        [getattr(row, other) / row.kernel if math.isfinite(row.kernel) else 0.0 for row in rows]
        for other in ("eager", "compiled")
    )
    return Verdict((min(eager), max(eager)), (min(compiled), max(compiled)))


@functools.cache
def tuned_config(kernel: str, key: str, candidates: tuple[AnyConfig, ...], device: torch.device) -> AnyConfig | None:
    """The measured configuration of a kernel under the launcher's key, or None; always one of the candidates."""
    row = _table(device).get("configs", {}).get(kernel, {}).get(key)
    return next((config for config in candidates if row == as_row(config)), None)


def as_row(config: tuple[int, ...]) -> dict[str, int]:
    """A configuration as the files hold it: its fields by name."""
    return config._asdict()  # type: ignore[attr-defined]  # a NamedTuple, which no annotation can say


@functools.cache
def tuned_choice(op: str, key: str, ways: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> str:
    """Which of several ways to compute an op was the fastest under a key; the first where nobody measured."""
    seconds = _table(device).get("choices", {}).get(op, {}).get(_name(dtype), {}).get(key, {})
    return min(ways, key=lambda way: seconds.get(way, float("inf")))


def forget() -> None:
    """Read the files again at the next question: what a program calls that has just written one."""
    for answers in (_table, tuned_config, tuned_choice):
        answers.cache_clear()
