"""Which implementation of an op runs: `auto`, `triton` or `torch`, per op, device and dtype.

`torch` is the plain-PyTorch reference, `triton` the kernel. `auto` takes the kernel where one exists, the hardware can
run it and it measured faster, else the reference. On a CPU the reference is always called directly, not through a
custom op, so that Inductor can fuse it with what stands around it. `--kernels` and `$VIBECHAT_KERNELS` set it, as one
word for all ops or with exceptions: `auto,relu2_mlp=torch`.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

OPS = ("rms_norm", "add_rms_norm", "qk_norm_rope", "relu2_mlp", "linear_cross_entropy", "newton_schulz")
BACKENDS = ("auto", "triton", "torch")

# op -> a function of (device, dtype) that says why its Triton kernel cannot be used there, or None if it can.
# A kernel's file fills its own entry in.
triton_refusals: dict[str, Callable[[torch.device, torch.dtype], str | None]] = {}

_requested: dict[str, str] = {}  # op -> backend asked for; empty until first asked


class Choice(NamedTuple):
    """One row of the table that a run prints when it starts."""

    op: str
    backend: str
    reason: str


def set_backend(spec: str) -> None:
    """Ask for backends: one of `auto`, `triton`, `torch`, optionally with exceptions, `auto,rms_norm=torch`.

    Raises:
        ValueError: naming the word that is no backend or no op.
    """
    default, exceptions = "auto", {}
    for word in filter(None, (part.strip() for part in spec.split(","))):
        op, _, backend = word.rpartition("=")
        if backend not in BACKENDS:
            raise ValueError(f"kernels: {backend!r} is no backend; one of {', '.join(BACKENDS)}")
        if op and op not in OPS:
            raise ValueError(f"kernels: {op!r} is no op; one of {', '.join(OPS)}")
        if op:
            exceptions[op] = backend
        else:
            default = backend
    _requested.update(dict.fromkeys(OPS, default) | exceptions)


def requested_backend(op: str) -> str:
    """The backend that was asked for, before anything about the hardware is known."""
    if not _requested:
        set_backend(os.environ.get("VIBECHAT_KERNELS", "auto"))
    return _requested[op]


def choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """What runs for `op` on tensors of this device and dtype, and why.

    Raises:
        ValueError: if `triton` was asked for and cannot be had.
    """
    requested = requested_backend(op)
    if requested == "torch":
        return Choice(op, "torch", "asked for")
    refusal = triton_refusals[op](device, dtype) if op in triton_refusals else "this version has no kernel for it"
    if refusal is None:
        return Choice(op, "triton", "asked for" if requested == "triton" else "fastest measured")
    if requested == "triton":
        raise ValueError(f"kernels: {op}=triton cannot run on {device.type} in {dtype}: {refusal}; use auto or torch")
    return Choice(op, "torch", refusal)


def backend_table(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """One choice per op, in the order of OPS."""
    return [choose(op, device, dtype) for op in OPS]
