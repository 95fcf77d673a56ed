"""One implementation of a training step in this process, told what to do over its standard input.

A worker builds the model, takes the steps that compile and warm up, prints a line of JSON, and then answers each line
that it reads with one of its own: a number is so many timed steps, "waterfall" one step under the profiler. It leaves
when its input ends. `Worker` is the other end: the parent keeps one process for each implementation, so that they can
take turns, and one that runs out of memory costs the others nothing.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from bench import plain_gpt
from bench.waterfall import STEP, Shapes, TraceClock, kernels_by_name, read_trace, timeline, waterfall
from vibechat.attention import attention_backend
from vibechat.common import UserError, compile_obstacle, compute_dtype, keep_freed_memory
from vibechat.fp8 import LEFT_TO_COMPILER
from vibechat.gpt import GPT
from vibechat.kernels import backend_table, set_backend
from vibechat.micro_batch import is_out_of_memory
from vibechat.scaling import plan
from vibechat.train_step import TrainStep, use_deterministic_algorithms
from vibechat.trainer import Rates, Trainer, memory_bytes, no_garbage_pauses, peak_rate

OUT_OF_MEMORY = 3  # exit status


class Work(Protocol):
    """What a worker does."""

    facts: dict[str, Any]

    def steps(self, count: int) -> dict[str, Any]:
        """Take so many steps; "seconds" are those of one."""

    def waterfall(self) -> dict[str, Any]:
        """Where one step went: "waterfall", seconds by category, and "kernels_by_name", its longest kernels."""


def synthetic_batches(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens, another batch each time, brought to the device as the loader brings them."""
    while True:
        tokens = torch.randint(args.vocab_size, (args.micro_batch, args.max_seq_len + 1))
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def real_batches(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The trainer's own loader on the built-in text, tokenizing as it goes."""
    from vibechat.dataloader import Loader
    from vibechat.dataset import open_dataset
    from vibechat.tokenizer import RustBPETokenizer

    dataset = open_dataset("builtin", progress=False)
    texts = dataset.iter_texts("train", max_chars=20_000_000)
    tokenizer = RustBPETokenizer.train_from_iterator(texts, args.vocab_size)
    rows = args.total_batch_size // args.max_seq_len
    return Loader(dataset, tokenizer, args.micro_batch, args.max_seq_len, rows_per_step=rows, device=device)


class TrainerWork:
    """Steps of vibechat's trainer on synthetic or real text."""

    def __init__(self, args: argparse.Namespace, *, compile: bool, kernels: str, fp8: bool = False) -> None:
        self.device = device = torch.device(args.device)
        keep_freed_memory()
        if device.type == "cpu":
            use_deterministic_algorithms()
        set_backend(kernels, left_to_compiler=LEFT_TO_COMPILER if fp8 else None)
        run = plan(
            args.depth,
            sequence_len=args.max_seq_len,
            vocab_size=args.vocab_size,
            total_batch_size=args.total_batch_size,
            num_iterations=10**6,
        )
        torch.manual_seed(0)
        with torch.device("meta"):  # a billion numbers that init_weights replaces
            model = GPT(run.model_config)
        model.to_empty(device=device)
        model.init_weights()
        model.activation_checkpointing = args.activation_checkpointing
        model.set_fp8(fp8)
        self.shapes = Shapes.of(run.model_config, args.micro_batch)
        self.most_kernels: int = args.kernels_by_name
        if compile:
            if obstacle := compile_obstacle(device):
                raise UserError(f"torch.compile cannot be used here: {obstacle}")
            _name_kernels()
        clock = TraceClock(device)
        self.step = TrainStep(
            model,
            model.setup_optimizers(),
            compile=compile,
            must_compile=True,  # a step without it is another implementation
            cuda_graphs=args.cuda_graphs,
            clock=clock,
            say=lambda text: None,
        )
        self.trainer = Trainer(
            self.step,
            real_batches(args, device) if args.data == "builtin" else synthetic_batches(args, device),
            micro_batches=args.total_batch_size // (args.max_seq_len * args.micro_batch),
            num_iterations=run.num_iterations,
            rates=Rates(args.total_batch_size),
            lr_multiplier=run.lr_multiplier,
            momentum=run.muon_momentum,
        )
        for _ in range(args.warmup):
            self.trainer.step()
        self.trainer.finish()
        dtype = compute_dtype(device)
        peak, convention = peak_rate(device)
        self.facts: dict[str, Any] = {
            "flops_per_token": model.estimate_flops(causal=True),
            "flops_per_token_full": model.estimate_flops(),
            "peak_flops": peak,
            "peak_is": convention,
            "dtype": str(dtype).removeprefix("torch."),
            "attention": attention_backend(device, dtype),
            "kernels": [list(choice) for choice in backend_table(device, dtype)],
        }

    def steps(self, count: int) -> dict[str, Any]:
        """Timed without a wait between steps; the loss of each is read when the next is under way, as in training."""
        clocks = []
        with no_garbage_pauses():
            start = time.perf_counter()
            for _ in range(count):
                self.trainer.step()
                clocks.append(dict(self.step.clock.seconds))
            self.trainer.finish()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            whole = (time.perf_counter() - start) / count
        on_host = [sum(clock.values()) for clock in clocks]
        return {
            "seconds": whole if self.device.type == "cuda" else statistics.median(on_host),
            "phases": {name: statistics.fmean(clock[name] for clock in clocks) for name in clocks[0]},
            "mean_seconds": statistics.fmean(on_host),
            "memory_bytes": peak_memory_bytes(self.device),
        }

    def waterfall(self) -> dict[str, Any]:
        """One step under the profiler, from a device at rest until it rests again."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        with tempfile.TemporaryDirectory() as folder, no_garbage_pauses():
            path = Path(folder) / "trace.json"
            # without acc_events, which would have Python parse every event before the trace is written
            with profile(activities=activities, record_shapes=True) as profiler, record_function(STEP):
                self.trainer.step()
                self.trainer.finish()
                if on_gpu:
                    torch.cuda.synchronize(self.device)
            profiler.export_chrome_trace(str(path))
            parts = timeline(read_trace(path), self.shapes)
        return {"waterfall": waterfall(parts), "kernels_by_name": kernels_by_name(parts, self.most_kernels)}


class PlainWork:
    """Forward + backward of the plain baseline, compiled, under the C library's own allocator settings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.facts: dict[str, Any] = {}
        self._device = torch.device(args.device)
        self._micro_batches = args.total_batch_size // (args.max_seq_len * args.micro_batch)
        self._timed = plain_gpt.timed_passes(
            depth=args.depth,
            length=args.max_seq_len,
            batch=args.micro_batch,
            vocab=args.vocab_size,
            dtype=compute_dtype(self._device),
            device=args.device,
        )
        for _ in range(args.warmup):
            next(self._timed)

    def steps(self, count: int) -> dict[str, Any]:
        """As many micro-batches as a step has take as many times one."""
        seconds = [next(self._timed) for _ in range(count)]
        one = statistics.median(seconds) * self._micro_batches
        return {"seconds": one, "memory_bytes": peak_memory_bytes(self._device)}

    def waterfall(self) -> dict[str, Any]:
        """It has none."""
        return {}


def _name_kernels() -> None:
    """Have Inductor's C++ kernels appear in a profile, under the names of what they fused."""
    import torch._inductor.config

    torch._inductor.config.cpp.enable_kernel_profile = True


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process had at once: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return memory_bytes(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return memory_bytes(device)


def serve(name: str, args: argparse.Namespace) -> int:
    """Be the worker `name`; returns the exit status."""
    out = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            work = make(name, args)
        print(json.dumps(work.facts), file=out, flush=True)
        for line in sys.stdin:
            with contextlib.redirect_stdout(sys.stderr):
                answer = work.waterfall() if line.strip() == "waterfall" else work.steps(int(line))
            print(json.dumps(answer), file=out, flush=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)
        return OUT_OF_MEMORY
    return 0


def make(name: str, args: argparse.Namespace) -> Work:
    """The implementation of that name, compiled and warm."""
    if name == "plain":
        return PlainWork(args)
    if name == "eager":
        return TrainerWork(args, compile=False, kernels="torch")
    if name == "compiled":
        return TrainerWork(args, compile=True, kernels="torch")
    return TrainerWork(args, compile=True, kernels=args.kernels, fp8=name == "fp8")


# ---------------------------------------------------------------------------------------------------------------------
# the other end


class DidNotFit(Exception):
    """A worker ran out of memory."""


class Worker:
    """A process that runs one implementation. Raises DidNotFit, or UserError with the last thing that it said.

    As a context it ends with it: at its own pace, or at once, compilers and all, where an exception ends the context.
    """

    def __init__(self, name: str, argv: list[str], micro_batch: int) -> None:
        self.name = name
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "bench.mfu", *argv, "--worker", name, "--micro-batch", str(micro_batch)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C is the parent's to hear
        )
        self.facts: dict[str, Any] = {}

    def wait_until_ready(self) -> None:
        """Returns when it has compiled and warmed up."""
        self.facts = self._answer()

    def steps(self, count: int) -> dict[str, Any]:
        """Timed steps."""
        return self._ask(str(count))

    def waterfall(self) -> dict[str, Any]:
        """Where one step went, as Work has it."""
        return self._ask("waterfall")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=0 if kind else 10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._errors.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # what else stands there a library wrote
                return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()] or ["no message"]
        if status in (OUT_OF_MEMORY, -9, 137):  # the last two: the system took the memory back
            raise DidNotFit(said[-1])
        print("\n".join(said[-60:]), flush=True)
        raise UserError(f"{self.name} failed: {said[-1]}")
