"""Which implementation of an op runs: `auto`, `triton` or `torch`, per op, device and dtype.

`torch` is the plain-PyTorch reference, `triton` the kernel. `auto` takes the kernel where one exists, the hardware can
run it and it measured faster on this device than the reference both eager and compiled, at every shape that was
measured (see `tuning`), else the reference: a kernel that nobody timed here is never chosen silently. On a CPU the
reference is always called directly, not through a custom op, so that Inductor can fuse it with what stands around it.
`--kernels` and `$VIBECHAT_KERNELS` set it, as one word for all ops (`triton`: wherever there is a kernel) or with
exceptions: `auto,relu2_mlp=torch`.
"""

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext

from vibechat.kernels import tuning
from vibechat.kernels.language import INTERPRETING, triton

OPS = ("rms_norm", "add_rms_norm", "qk_norm_rope", "relu2_mlp", "linear_cross_entropy", "newton_schulz")
BACKENDS = ("auto", "triton", "torch")
NEVER_MEASURED = "the kernel was never measured on this device (--kernels triton takes it)"

# op -> a function of (device, dtype) that says why its Triton kernel cannot be used there, or None if it can.
# A kernel's file fills its own entry in.
triton_refusals: dict[str, Callable[[torch.device, torch.dtype], str | None]] = {}

_requested: dict[str, str] = {}  # op -> backend asked for by set_backend; empty before
_left: dict[str, str] = {}  # op -> why set_backend left it to the compiler
_decided: dict[tuple[str, str | None, torch.device, torch.dtype], bool] = {}  # what takes_kernel found out
_said: set[tuple[str, str]] = set()  # fallbacks that have had their line


class Choice(NamedTuple):
    """One row of the table that a run prints when it starts."""

    op: str
    backend: str
    reason: str


def set_backend(spec: str, *, left_to_compiler: Mapping[str, str] | None = None) -> None:
    """Ask for backends: one of `auto`, `triton`, `torch`, optionally with exceptions, `auto,rms_norm=torch`.

    `triton` alone means every op that has a kernel; `op=triton` insists on that one.

    Args:
        spec: the backends.
        left_to_compiler: {op: why} of ops that run as plain PyTorch, unless `spec` names them: where the compiler
            joins them to something that a kernel would keep it from.

    Raises:
        ValueError: naming the word that is no backend or no op.
    """
    requested = _parse(spec)
    named = {word.partition("=")[0].strip() for word in spec.split(",") if "=" in word}
    _left.clear()
    _left.update({op: why for op, why in (left_to_compiler or {}).items() if op not in named})
    _requested.update(requested | dict.fromkeys(_left, "torch"))


def _parse(spec: str) -> dict[str, str]:
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
    without_kernel = [op for op in OPS if default == "triton" and op not in triton_refusals]
    return dict.fromkeys(OPS, default) | dict.fromkeys(without_kernel, "auto") | exceptions


def requested_backend(op: str) -> str:
    """The backend that was asked for, before anything about the hardware is known."""
    return (_requested or _parse(os.environ.get("VIBECHAT_KERNELS", "auto")))[op]


def choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """What runs for `op` on tensors of this device and dtype, and why.

    Raises:
        ValueError: if `triton` was asked for and cannot be had.
    """
    requested = requested_backend(op)
    if requested == "torch":
        return Choice(op, "torch", _left.get(op, "asked for"))
    refusal = triton_refusals[op](device, dtype) if op in triton_refusals else "this version has no kernel for it"
    if refusal is None and requested == "triton":
        return Choice(op, "triton", "asked for")
    if requested == "triton":
        raise ValueError(f"kernels: {op}=triton cannot run on {device.type} in {dtype}: {refusal}; use auto or torch")
    if refusal is not None:
        return Choice(op, "torch", refusal)
    verdict = tuning.verdict(op, device, dtype)
    if verdict is None:
        return Choice(op, "torch", NEVER_MEASURED)
    eager, compiled = (_range(ratios) for ratios in verdict)
    said = f"the kernel measured {eager} eager and {compiled} compiled"
    return Choice(op, "triton" if verdict.kernel_wins else "torch", said)


def _range(ratios: tuple[float, float]) -> str:
    low, high = (f"{ratio:.2f}x" for ratio in ratios)
    return low if low == high else f"{low} to {high}"


def tuning_advice(table: list[Choice]) -> str | None:
    """What to do about kernels that `auto` left out because nobody measured them here, or None if there are none."""
    ops = [choice.op for choice in table if choice.reason == NEVER_MEASURED]
    if not ops:
        return None
    return (
        f"{', '.join(ops)}: measure them once on this GPU with python -m bench.tune (minutes; kept for every later run)"
    )


def backend_table(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """One choice per op, in the order of OPS."""
    return [choose(op, device, dtype) for op in OPS]


def takes_kernel(op: str, x: Tensor) -> bool:
    """Whether `op` runs its Triton kernel on a tensor like x: what each op asks first, for two dictionary look-ups.

    Under torch.compile the answer is a constant of the graph, guarded by the request, so that it breaks no graph and
    a later set_backend compiles anew.

    Raises:
        ValueError: as `choose`.
    """
    if x.is_cpu and not INTERPRETING:
        return False
    return _decide(op, _requested.get(op), x.device, x.dtype)


@torch.compiler.assume_constant_result
def _decide(op: str, requested: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    decided = _decided.get((op, requested, device, dtype))
    if decided is None:
        decided = choose(op, device, dtype).backend == "triton"
        _decided[op, requested, device, dtype] = decided
    if decided and TracingContext.try_get() is not None:
        _tell_inductor()
    return decided


@functools.cache
def _tell_inductor() -> None:
    """That ops of ours are calls, before it meets one.

    It would find that out, but PyTorch 2.11 then writes down, for a log that nobody keeps, what the op's arguments are
    computed from (GraphLowering.call_function): a text that grows fourfold with each block before the loss, so that a
    model of four blocks takes minutes to compile and one of 26 never ends.
    """
    try:
        from torch._inductor import lowering

        for name in torch.ops.vibechat:
            op = getattr(torch.ops.vibechat, name).default
            if op not in lowering.lowerings:
                strides = lowering.tag_to_layout_constraint(lowering.get_layout_constraint_tag(op))
                lowering.make_fallback(op, layout_constraint=strides, warn=False)
    except (ImportError, AttributeError):  # another version's Inductor
        return


@torch.compiler.assume_constant_result
def say_fallback(op: str, why: str, instead: str = "plain PyTorch runs") -> None:
    """Say once that a kernel was chosen but cannot take these arguments, and what runs instead."""
    if (op, why) not in _said:
        _said.add((op, why))
        warnings.warn(f"kernels: {op}: {why}: {instead} instead", stacklevel=2)


def hardware_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel of this package can run there, or None: what every op's refusal has in common."""
    if triton is None:
        return "Triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"not in {dtype}"
    if device.type == "cpu":
        return None if INTERPRETING else "on a CPU Inductor fuses plain PyTorch"
    if device.type != "cuda":
        return f"Triton does not run on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def count_no_flops(*ops: torch._ops.OpOverloadPacket) -> None:
    """Let FlopCounterMode count an op as it counts the op's reference, which has no matmul: an MFU is the same with
    and without kernels."""
    for op in ops:
        count_flops(op, lambda *shapes: 0)


def count_flops(op: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """Let FlopCounterMode count an op by a formula of its arguments, where each tensor is given as its shape."""
    if triton is not None:  # without it the import prints a warning
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(op)(lambda *arguments, **_: formula(*arguments))
