"""What was measured on a device: the best launch configuration of each kernel, and whether it beats plain PyTorch.

One JSON file per device, shipped in `tuned/` (so that training never waits for autotuning) or written by
`python -m bench.tune` to `$VIBECHAT_BASE_DIR/kernels/`, which wins. It holds

    {"configs": {"rms_norm_forward": {"2048": [rows, warps]}},                                  by width of a block
     "ops": {"rms_norm": {"bfloat16": {"kernel": s, "eager": s, "compiled": s}}}, ...}       seconds, both passes

Without a file the default configuration of each kernel runs, and only where a run insists on the kernel.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHIPPED = Path(__file__).parent / "tuned"


class Config(NamedTuple):
    """How a row kernel is launched."""

    rows: int
    """rows a program computes"""
    warps: int
    """warps of a program"""


class Measured(NamedTuple):
    """Seconds of an op, forward and backward, summed over the shapes that were measured."""

    kernel: float
    eager: float
    compiled: float

    @property
    def against_eager(self) -> float:
        """How many times as fast as the eager reference."""
        return self.eager / self.kernel

    @property
    def against_compiled(self) -> float:
        """How many times as fast as the reference under torch.compile."""
        return self.compiled / self.kernel

    @property
    def kernel_wins(self) -> bool:
        """Whether the kernel is faster than both."""
        return self.kernel < min(self.eager, self.compiled)


def device_slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"nvidia|amd", "", name.lower())).strip("-")


def cached_file(slug: str) -> Path:
    """Where measurements made on this machine stand."""
    base = os.environ.get("VIBECHAT_BASE_DIR") or Path.home() / ".cache" / "vibechat"
    return Path(base) / "kernels" / f"{slug}.json"


def read_table(slug: str) -> dict[str, Any]:
    """The measurements of a device, this machine's own before the shipped ones; empty if there are none."""
    for file in (cached_file(slug), SHIPPED / f"{slug}.json"):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return {}


@functools.cache
def _table(device: torch.device) -> dict[str, Any]:
    return read_table(device_slug(torch.cuda.get_device_name(device))) if device.type == "cuda" else {}


def measured(op: str, device: torch.device, dtype: torch.dtype) -> Measured | None:
    """The seconds of an op on this device, or None if nobody timed it there."""
    row = _table(device).get("ops", {}).get(op, {}).get(str(dtype).removeprefix("torch."))
    return Measured(row["kernel"], row["eager"], row["compiled"]) if row else None


@functools.cache
def tuned_config(kernel: str, width: int, device: torch.device) -> Config | None:
    """The measured configuration of a kernel for a block of this width, or None."""
    row = _table(device).get("configs", {}).get(kernel, {}).get(str(width))
    return Config(*row) if row else None


def forget() -> None:
    """Read the files again at the next question: what a program calls that has just written one."""
    _table.cache_clear()
    tuned_config.cache_clear()
