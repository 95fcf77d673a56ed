"""The one training loop that base, mid and SFT share.

`Trainer` repeats a `TrainStep`, with evaluation, samples and checkpoints between steps. The host never waits for the
step that it has just queued: loss, gradient norm and found-inf flag of step s are read when step s + 1 is under way.
A step whose loss or gradient was not finite has changed no parameter, and stops the run one step later.

This module needs neither the command line, nor the tokenizer's extension, nor the dataset layer.
"""

import contextlib
import functools
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vibechat.common import UserError, compute_dtype, get_dist_info, peak_flops
from vibechat.train_step import MicroBatch, Readback, TrainStep


class NonFiniteError(UserError):
    """A step's loss or gradient norm was infinite or not a number. Its update was suppressed."""


# ---------------------------------------------------------------------------------------------------------------------
# the loop


@dataclass
class Every:
    """How often, in steps, each thing happens between steps; -1 (or 0) is never."""

    evaluate: int = -1
    sample: int = -1
    save: int = -1


@dataclass
class Hooks:
    """What happens between steps. Each is called with the number of updates done."""

    log: Callable[[dict[str, Any]], None] = lambda record: None  # one finished step's metrics
    evaluate: Callable[[int], float | None] = lambda step: None  # val bits per byte; None if it was broken off
    sample: Callable[[int], None] = lambda step: None
    save: Callable[[int], Path | None] = lambda step: None  # None: could not be saved, and said so
    say: Callable[[str], None] = print


@dataclass
class Rates:
    """What turns seconds into the throughput that a step reports."""

    tokens_per_step: int
    flops_per_token: float = 0.0  # causal attention counted once
    flops_per_token_full: float = 0.0  # the whole T x T square counted, as nanochat does
    peak_flops: float | None = None  # FLOP/s of all devices together

    def metrics(self, seconds: float) -> dict[str, float]:
        """Throughput of a step that took `seconds`."""
        rate = self.tokens_per_step / seconds
        found = {"train/tok_per_sec": rate}
        if self.peak_flops:
            found["train/mfu"] = rate * self.flops_per_token / self.peak_flops
            found["train/mfu_full"] = rate * self.flops_per_token_full / self.peak_flops
        return found


@dataclass
class _Pending:
    """A step that was queued and whose numbers have not been read."""

    step: int
    numbers: Readback
    lr_multiplier: float
    clock: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Repeats a step until `num_iterations` updates are done, or a signal asks to stop.

    Args:
        train_step: the step; its clock is started here, and marked with "data" and "other".
        batches: an endless iterator of micro-batches.
        micro_batches: how many of them make a step.
        num_iterations: updates in the whole run.
        rates: for throughput and MFU.
        lr_multiplier, momentum: the schedules, by the number of updates done.
        start: updates that were done before (a resumed run).
        every, hooks: what happens between steps.
        last_checkpoint: what a resumed run started from.
        profiler: stepped with the training, if there is one.
    """

    def __init__(
        self,
        train_step: TrainStep,
        batches: Iterator[MicroBatch],
        *,
        micro_batches: int,
        num_iterations: int,
        rates: Rates,
        lr_multiplier: Callable[[int], float] = lambda step: 1.0,
        momentum: Callable[[int], float] | None = None,
        start: int = 0,
        every: Every | None = None,
        hooks: Hooks | None = None,
        last_checkpoint: Path | None = None,
        profiler: torch.profiler.profile | None = None,
    ) -> None:
        self.train_step = train_step
        self.batches = batches
        self.micro_batches = micro_batches
        self.num_iterations = num_iterations
        self.rates = rates
        self.lr_multiplier = lr_multiplier
        self.momentum = momentum
        self.start = self.step_number = start
        self.every = every or Every()
        self.hooks = hooks or Hooks()
        self.last_checkpoint = last_checkpoint
        self.profiler = profiler
        self.stop_signal: int | None = None  # the signal that asked to stop
        self._saved_step = start if last_checkpoint else -1
        self._pending: _Pending | None = None
        self._extra: dict[str, float] = {}

    # -- one step

    def step(self) -> None:
        """Train on the next R rows, and report the step before."""
        clock, step = self.train_step.clock, self.step_number
        clock.start()
        batches = [next(self.batches) for _ in range(self.micro_batches)]
        clock.mark("data")
        multiplier = self.lr_multiplier(step)
        numbers = self.train_step(batches, multiplier, self.momentum(step) if self.momentum else None)
        queued = _Pending(step, Readback(numbers), multiplier, extra=self._extra)
        self.finish()
        clock.mark("other")
        queued.clock = clock.seconds
        self._pending, self._extra = queued, {}
        self.step_number = step + 1

    def finish(self) -> None:
        """Read and report the step that is under way, if there is one.

        Raises NonFiniteError if its update was suppressed.
        """
        done, self._pending = self._pending, None
        if done is None:
            return
        loss, norm, suppressed = done.numbers.read()
        if suppressed:
            last = (
                f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "none was saved yet"
            )
            raise NonFiniteError(
                f"step {done.step}, rank {get_dist_info()[1]}: loss {loss}, gradient norm {norm}; the update was "
                f"suppressed and no parameter touched by it; {last}"
            )
        seconds = sum(done.clock.values())
        record: dict[str, Any] = {
            "step": done.step,
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr_multiplier": done.lr_multiplier,
            **self.rates.metrics(seconds),
            "train/data_wait": done.clock.get("data", 0.0) / seconds,
            "train/step_seconds": seconds,
            "train/memory_bytes": memory_bytes(self.train_step.parameters[0].device),
            **done.extra,
        }
        self.hooks.log(record)

    # -- the whole run

    def train(self) -> int:
        """Train to the end, or until SIGTERM or Ctrl-C, saving at either.

        Returns:
            The exit status: 0, also after SIGTERM, or 130 after Ctrl-C.

        Raises:
            NonFiniteError: as `finish`. Nothing is saved.
        """
        with _signals(self), _profiling(self.profiler), no_garbage_pauses():
            while True:
                self._between_steps()
                if self.stop_signal is not None or self.step_number >= self.num_iterations:
                    break
                self.step()
                if self.profiler is not None:
                    self.profiler.step()
                if self.step_number == self.start + 1:
                    gc.collect()
                    gc.freeze()
        if self.stop_signal is not None:
            name = "SIGTERM" if self.stop_signal == signal.SIGTERM else "Ctrl-C"
            self.hooks.say(f"{name}: stopped after {self.step_number} of {self.num_iterations} steps")
        return 130 if self.stop_signal == signal.SIGINT else 0

    def _between_steps(self) -> None:
        step, last = self.step_number, self.step_number >= self.num_iterations
        stopping = self.stop_signal is not None

        def due(every: int) -> bool:
            return every > 0 and (last or step % every == 0)

        if stopping or last or due(self.every.evaluate) or due(self.every.sample) or due(self.every.save):
            self.finish()
            gc.collect(1)
        if step > self.start and step != self._saved_step and (stopping or last or due(self.every.save)):
            self._save(step, must=stopping or last)
        if not stopping and due(self.every.evaluate):
            bits_per_byte = self.hooks.evaluate(step)
            if bits_per_byte is not None:
                self._extra["val/bpb"] = bits_per_byte
        if self.stop_signal is None and step > 0 and due(self.every.sample):
            self.hooks.sample(step)
        if last and self._extra:
            self.hooks.log({"step": step, **self._extra})
            self._extra = {}

    def _save(self, step: int, *, must: bool) -> None:
        try:
            path = self.hooks.save(step)
        except UserError as error:
            if must:
                raise
            self.hooks.say(f"warning: {error}; training goes on, and tries again at the next save")
            return
        if path is not None:
            self.last_checkpoint, self._saved_step = path, step


@contextlib.contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C ask the trainer to stop after the step under way; a second Ctrl-C interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if trainer.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop_signal = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _profiling(profiler: torch.profiler.profile | None) -> Iterator[None]:
    if profiler is None:
        yield
    else:
        with profiler:
            yield


@contextlib.contextmanager
def no_garbage_pauses() -> Iterator[None]:
    """No automatic garbage collection inside (nanochat saw 500 ms pauses); the loop collects between steps."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# what a machine does


def memory_bytes(device: torch.device) -> int:
    """The most that was allocated on a GPU so far; on a CPU, what the process holds now (0 where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        if sys.platform == "win32":
            return 0
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def measure_matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 4096, seconds: float = 1.0) -> float:
    """FLOP/s of a size-cubed matmul in `dtype`, the best of the repetitions that fit into `seconds` (at least two).

    It stands for the peak where the device's data sheet is not known. Deterministic algorithms or not, it is the same.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    best, begin, count = math.inf, time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if count > 0:  # the first one allocates and warms up
            best = min(best, time.perf_counter() - start)
        count += 1
    return 2 * size**3 / best


@functools.cache
def peak_rate(device: torch.device) -> tuple[float, str]:
    """(FLOP/s that MFU is measured against, where that number comes from)."""
    known = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is not None and compute_dtype(device) == torch.bfloat16:
        return known, "the data sheet's dense bf16 peak"
    dtype = compute_dtype(device)
    name = str(dtype).removeprefix("torch.")
    return measure_matmul_flops(device, dtype), f"what a 4096-cubed {name} matmul just reached here"


def make_profiler(path: Path, device: torch.device) -> torch.profiler.profile:
    """Traces three steps after the first three, which compile and warm up, into `path` (for chrome://tracing)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        acc_events=True,
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    )
