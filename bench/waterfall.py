"""Where a training step goes: from a profiler's trace to seconds by category that add up to the step exactly.

The step's time line is the device's. At each instant what runs there has a category (on a CPU the innermost operator
of the training thread, on a GPU the kernel); an instant at which nothing runs is a wait for data while the host fetches
a batch, else a gap: Python, autograd, launches. So the sum is the step, whatever the profiler saw or missed.

A matmul's family follows from its shape, an op of ours from its name, a fused kernel of Inductor from the operators
in its name, and an eager operator from the shapes that it works on; what is none of these is "other kernels".
`kernels_by_name` takes the same time line apart by the names of what ran.
`TraceClock` makes the trace carry the phases of a step, and `read_trace` takes torch.profiler's Chrome trace, so that a
recorded run can be read again anywhere.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from vibechat.gpt import GPTConfig
from vibechat.train_step import PhaseClock

STEP, PHASE = "vibechat.step", "vibechat.phase "
GAPS, WAIT, OTHER = "host gaps", "data wait", "other kernels"
CATEGORIES = (
    "matmul qkv+o",
    "matmul mlp",
    "matmul lm_head",
    "attention",
    "norms and rope",
    "activation",
    "loss",
    "embedding",
    "casts and sums of weights",
    OTHER,
    "optimizer",
    WAIT,
    GAPS,
)
# what neither computes nor moves anything by itself: its own time is the host's
WRAPPERS = ("autograd::", "CompiledFunction", "Torch-Compiled", "TorchDynamo", "Pregraph", "AOTDispatcher", "## Call")


class TraceClock(PhaseClock):
    """A clock whose marks stand in the trace, too."""

    def mark(self, phase: str) -> None:
        """As PhaseClock; the phase ends here in the trace."""
        super().mark(phase)
        with record_function(PHASE + phase):
            pass


@dataclass
class Event:
    """One operator, annotation or kernel of a trace; times in microseconds."""

    name: str
    kind: str
    """the trace's category: cpu_op, user_annotation, cuda_runtime, kernel, gpu_memcpy, gpu_memset ..."""
    start: float
    stop: float
    thread: Any
    sizes: list[list[int]] = field(default_factory=list)
    """of the tensors that it takes"""
    link: int | None = None
    """the operator that launched a kernel has the same"""
    parent: "Event | None" = None


@dataclass(frozen=True)
class Shapes:
    """The sizes that tell one matmul from another."""

    rows: int
    """tokens of a micro-batch"""
    channels: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: GPTConfig, micro_batch: int) -> "Shapes":
        """Of a model and the rows of its micro-batch."""
        return cls(micro_batch * config.sequence_len, config.n_embd, config.head_dim, config.vocab_size)


def read_trace(path: Path) -> list[Event]:
    """The complete events of a Chrome trace that torch.profiler exported."""
    events = []
    for raw in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
        if raw.get("ph") != "X" or "dur" not in raw or "cat" not in raw:
            continue
        args = raw.get("args", {})
        sizes = [size for size in args.get("Input Dims", []) if size and isinstance(size[0], int)]
        link = args.get("External id")
        start = float(raw["ts"])
        events.append(Event(raw["name"], raw["cat"], start, start + float(raw["dur"]), raw["tid"], sizes, link))
    return events


# ---------------------------------------------------------------------------------------------------------------------
# the category of an operator or kernel


def matmul_family(sizes: Sequence[Sequence[int]], shapes: Shapes) -> str:
    """Which matmul of the model has these operands. The hidden layer must not be as wide as the vocabulary is large."""
    (*_, m, k), (*_, n) = sizes[0], sizes[1]
    dims, C = [m, k, n], shapes.channels
    of_the_head = shapes.vocabulary in dims
    if shapes.rows in dims:
        dims.remove(shapes.rows)
        if shapes.rows == shapes.vocabulary:  # as with 32 rows of 2048 tokens: then a block's two other sizes tell
            of_the_head = not set(dims) <= {C, 3 * C, 4 * C}
    if of_the_head:
        return "matmul lm_head"
    return "matmul mlp" if 4 * C in dims else "matmul qkv+o"


def _of_name(name: str) -> str | None:
    """The category that a name gives away, whatever the shapes."""
    low = name.lower()
    if "::" not in low and any(word in low for word in ("fmha", "flash", "sdpa", "attention")):
        return "attention"  # a kernel of cuDNN or of FlashAttention
    if any(word in low for word in ("scaled_dot_product", "attention", "flash", "flex_")):
        return "attention"
    if "cross_entropy" in low:
        return "loss"
    if "relu2" in low:
        return "matmul mlp" if "mlp" in low or "matmul" in low else "activation"
    if any(word in low for word in ("rms_norm", "norm_rope", "rope_norm")):
        return "norms and rope"
    if "embedding" in low and "fused" not in low:
        return "embedding"
    if "_foreach_" in low:  # outside of the optimizer only weights come in lists
        return "casts and sums of weights"
    return None


def _of_fused(name: str) -> str | None:
    """The category of a kernel that Inductor fused, from the operators in its name."""
    if "fused" not in name or "::" in name:
        return None
    words = set(name.replace("__", "_").split("_"))
    if words & {"exp2", "log", "gather", "nll", "tanh", "logsumexp", "softmax"}:
        return "loss"
    if words & {"relu", "threshold"}:
        return "activation"
    if words & {"tril", "amax", "exp"}:
        return "attention"
    if words & {"rsqrt", "rms", "mean", "neg", "cat"}:
        return "norms and rope"
    return "embedding" if "embedding" in words else OTHER


def _of_shape(sizes: Sequence[Sequence[int]], shapes: Shapes) -> str | None:
    """The category of an eager operator, from the largest tensor that it takes."""
    if not sizes:
        return None
    largest = max(sizes, key=lambda size: torch.Size(size).numel())
    C, V, D = shapes.channels, shapes.vocabulary, shapes.head_dim
    last = largest[-1]
    of_weights = largest[0] == V or (C in largest and set(largest) <= {C, 3 * C, 4 * C})
    if len(largest) == 2 and of_weights and largest[0] != shapes.rows:
        return "casts and sums of weights"
    if last == V:
        return "loss"
    if last == 4 * C:
        return "activation"
    if last in (C, 1, D, D // 2) and len(largest) > 1:
        return "norms and rope"
    return None


def category(event: Event, shapes: Shapes) -> str:
    """The category of an operator or kernel, from it and from what it is part of; GAPS for what only wraps others."""
    chain, at = [], event
    while at is not None and at.kind not in ("user_annotation",):
        chain.append(at)
        at = at.parent  # type: ignore[assignment]
    for one in chain:
        if one.name.startswith(("aten::bmm", "aten::baddbmm")):
            return "attention"  # no other matmul of the model has a batch of matrices
        if one.name.startswith(("aten::mm", "aten::addmm", "aten::_scaled_mm")) and len(one.sizes) > 1:
            return matmul_family(one.sizes, shapes)
    for one in chain:
        if found := _of_name(one.name):
            return found
    for one in chain:
        if found := _of_fused(one.name):
            return found
    working = [one for one in chain if not one.name.startswith(WRAPPERS) and not one.name.endswith(("Backward0",))]
    if not working or (len(working) == 1 and working[0].kind in ("cuda_runtime", "cuda_driver")):
        return GAPS
    for one in working:
        if found := _of_shape(one.sizes, shapes):
            return found
    return OTHER


# ---------------------------------------------------------------------------------------------------------------------
# the time line


def nest(events: Iterable[Event]) -> list[Event]:
    """Give each event of a thread the innermost one around it as its parent; returns them by start."""
    ordered = sorted(events, key=lambda event: (event.start, -event.stop))
    stacks: dict[Any, list[Event]] = {}
    for event in ordered:
        stack = stacks.setdefault(event.thread, [])
        while stack and stack[-1].stop <= event.start:
            stack.pop()
        event.parent = stack[-1] if stack else None
        stack.append(event)
    return ordered


def _phases(marks: list[Event], begin: float) -> list[tuple[float, float, str]]:
    """(start, stop, name) of each phase, from the marks that end them."""
    phases = []
    for mark in sorted(marks, key=lambda event: event.start):
        phases.append((begin, mark.start, mark.name.removeprefix(PHASE)))
        begin = mark.start
    return phases


def _phase_at(phases: list[tuple[float, float, str]], time: float) -> str:
    return next((name for start, stop, name in phases if start <= time < stop), "other")


class Part(NamedTuple):
    """What one kernel or operator has of the step's time line; without a name, what none has."""

    name: str
    category: str
    seconds: float


def timeline(events: list[Event], shapes: Shapes) -> list[Part]:
    """The parts of a step, which add up to the step's own seconds. Raises ValueError if the trace holds no step."""
    step = next((event for event in events if event.name == STEP and event.kind == "user_annotation"), None)
    if step is None:
        raise ValueError("the trace holds no step: run it under record_function(waterfall.STEP)")
    on_gpu = [event for event in events if event.kind in ("kernel", "gpu_memcpy", "gpu_memset")]
    inside = [e for e in events if not e.kind.startswith("gpu_") and e.kind != "kernel"]
    inside = nest(e for e in inside if e.start < step.stop and e.stop > step.start)
    phases = _phases([event for event in inside if event.name.startswith(PHASE)], step.start)
    if on_gpu:
        found = _kernels(on_gpu, inside, step, phases, shapes)
    else:
        found = _operators([e for e in inside if e.thread == step.thread], phases, shapes)
    parts = [Part(name, category, microseconds / 1e6) for name, category, microseconds in found]
    return [*parts, Part("", GAPS, (step.stop - step.start) / 1e6 - sum(part.seconds for part in parts))]


def waterfall(parts: Iterable[Part]) -> dict[str, float]:
    """Seconds of a step by category, in the order of CATEGORIES."""
    totals = dict.fromkeys(CATEGORIES, 0.0)
    for part in parts:
        totals[part.category] += part.seconds
    return totals


def kernels_by_name(parts: Iterable[Part], most: int) -> list[dict[str, Any]]:
    """The longest kernels (on a CPU operators, each without those inside it), what has the same name and category
    together: name, category, calls and seconds."""
    totals: dict[tuple[str, str], dict[str, Any]] = {}
    for name, category, seconds in parts:
        if name and category != GAPS:
            fresh = {"name": name, "category": category, "calls": 0, "seconds": 0.0}
            row = totals.setdefault((name, category), fresh)
            row["calls"] += 1
            row["seconds"] += seconds
    return sorted(totals.values(), key=lambda row: -row["seconds"])[:most]


def _operators(
    events: list[Event], phases: list[tuple[float, float, str]], shapes: Shapes
) -> Iterator[tuple[str, str, float]]:
    """On a CPU: (name, category, microseconds) of each operator, without those of the operators inside it."""
    own = {id(event): event.stop - event.start for event in events}
    for event in events:
        if event.parent is not None and id(event.parent) in own:
            own[id(event.parent)] -= event.stop - event.start
    waited = 0.0
    for event in events:
        if event.kind == "user_annotation":
            continue
        phase = _phase_at(phases, event.start)
        found = {"data": WAIT, "optimizer": "optimizer"}.get(phase) or category(event, shapes)
        waited += own[id(event)] if found == WAIT else 0.0
        yield event.name, found, own[id(event)]
    in_data = sum(stop - start for start, stop, phase in phases if phase == "data")
    yield "", WAIT, in_data - waited  # the loader is plain Python: what no operator took of its phase


def _kernels(
    kernels: list[Event], host: list[Event], step: Event, phases: list[tuple[float, float, str]], shapes: Shapes
) -> Iterator[tuple[str, str, float]]:
    """On a GPU: each kernel, what overlaps counted once; idle time while the host fetched data."""
    launchers: dict[int, Event] = {}
    for event in host:
        if event.link is not None and event.kind == "cpu_op":
            launchers[event.link] = event
    idle: list[tuple[float, float]] = []
    clock = step.start
    for kernel in sorted(kernels, key=lambda event: event.start):
        start, stop = max(kernel.start, clock), min(kernel.stop, step.stop)
        if stop <= start:
            continue
        if start > clock:
            idle.append((clock, start))
        clock = stop
        launcher = launchers.get(kernel.link) if kernel.link is not None else None
        kernel.parent = launcher
        if launcher is not None and _phase_at(phases, launcher.start) == "optimizer":
            yield kernel.name, "optimizer", stop - start
        else:
            yield kernel.name, _of_kernel(kernel, shapes), stop - start
    idle.append((clock, step.stop))
    for start, stop, phase in phases:
        if phase == "data":
            yield "", WAIT, sum(max(0.0, min(stop, b) - max(start, a)) for a, b in idle)


def _of_kernel(kernel: Event, shapes: Shapes) -> str:
    """The category of a kernel; inside the loss a matmul is the head's, whoever wrote it."""
    low = kernel.name.lower()
    if any(word in low for word in ("gemm", "nvjet", "matmul", "cutlass")):
        chain, at = [], kernel.parent
        while at is not None:
            chain.append(at.name)
            at = at.parent
        if any("cross_entropy" in name for name in chain):
            return "matmul lm_head"
    found = category(kernel, shapes)
    return OTHER if found == GAPS else found


def waterfall_lines(parts: dict[str, float], timed: float) -> list[str]:
    """The waterfall as text, with its sum, and beside it the seconds of a step that no profiler looks at."""
    total = sum(parts.values())
    lines = [
        f"  {name:<26}{1e3 * seconds:>10.2f} ms{100 * seconds / total:>7.1f}%"
        for name, seconds in parts.items()
        if seconds or name in (WAIT, GAPS)
    ]
    sums = {"the step, profiled": total, "a step, as timed": timed}
    return [*lines, *(f"  {name:<26}{1e3 * seconds:>10.2f} ms" for name, seconds in sums.items())]


def kernel_lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Kernels by name as text."""
    return [
        f"  {1e3 * row['seconds']:>9.3f} ms {row['calls']:>5}x  {row['category']:<26}{row['name'][:90]}" for row in rows
    ]
