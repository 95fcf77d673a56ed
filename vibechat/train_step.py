"""One step of training, and nothing else: a benchmark drives it with synthetic tokens.

A step takes R rows of T tokens as micro-batches, and its loss is the sum of nats over all of them divided by how many
targets count, so that the split into micro-batches changes nothing but rounding:

    loss = sum_m nats(micro-batch m) / sum_m (valid targets of micro-batch m)

A step whose loss or gradient is not finite changes no parameter: the optimizers see a flag on the device, without the
host having to wait for it. Weights are cast for the matmuls once a step (`vibechat.working_weights`).
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vibechat.common import UserError
from vibechat.working_weights import WorkingWeights

MicroBatch = tuple[Tensor, Tensor]  # inputs (B, T) and targets (B, T), int64; a target of -1 does not count


class TrainingOptimizer(Protocol):
    """What a step needs of an optimizer: torch.optim.Optimizer plus a flag that suppresses the update."""

    param_groups: list[dict[str, Any]]
    state: Any
    found_inf: Tensor | None

    def step(self) -> Any: ...


class PhaseClock:
    """Splits the wall time of a step into named phases, which add up to it exactly.

    On a GPU the host runs ahead of the device, so that a phase is the time until its work was queued, and the wait for
    the device shows in the last phase; with synchronize=True each mark waits for the device (slower, but attributed).
    """

    def __init__(self, device: torch.device, *, synchronize: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize and device.type == "cuda"
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begin a step."""
        self.seconds = {}
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Everything since the mark before this one was `phase`."""
        if self._synchronize:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of the step so far."""
        return sum(self.seconds.values())


class TrainStep:
    """Forward and backward over a step's micro-batches, then the optimizers' update.

    Args:
        model: `model(inputs, targets, loss_reduction="sum")` gives summed nats as a scalar tensor. If it has
            `matmul_weights()`, those are cast to its `compute_dtype` once a step, and rounded for its `fp8_weights()`.
        optimizers: together they own every parameter of the model.
        compile: run forward and backward through torch.compile. A compiler that fails costs one line and eager steps.
        must_compile: let a compiler that fails raise instead.
        cuda_graphs: have torch.compile replay CUDA graphs. A graph's outputs are overwritten by its next run, so that
            the gradients then live in memory of their own from step to step, and each micro-batch is added to them.
        grad_clip: largest gradient norm, larger ones are scaled down to it; 0 leaves them alone.
        clock: marked with the phases "forward+backward" and "optimizer".
        say: prints a line for the person who watches.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Sequence[TrainingOptimizer],
        *,
        compile: bool = False,
        must_compile: bool = False,
        cuda_graphs: bool = False,
        grad_clip: float = 0.0,
        clock: PhaseClock | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.grad_clip = grad_clip
        self.compiled = compile
        self._must_compile = must_compile
        self._cuda_graphs = compile and cuda_graphs
        self.clock = clock or PhaseClock(self.parameters[0].device)
        self._say = say
        self._first = True
        self._working: WorkingWeights | None = None
        self._loss_sum = self._eager_loss_sum
        if compile:
            mode = "reduce-overhead" if cuda_graphs else None
            self._loss_sum = torch.compile(self._eager_loss_sum, dynamic=False, mode=mode)

    def _eager_loss_sum(self, inputs: Tensor, targets: Tensor, weights: dict[str, Tensor]) -> Tensor:
        call = torch.func.functional_call  # with `weights` in the place of the parameters of those names
        return call(self.model, weights, (inputs, targets), {"loss_reduction": "sum"})

    def _cast_weights(self, micro_batches: int) -> dict[str, Tensor]:
        """What this step's matmuls read in the place of the masters; nothing where that saves nothing.

        That is where matmuls run in the dtype of the parameters, and on a CPU with a single micro-batch, where the
        compiler fuses the casts with what stands around them (1% of a step at depth 4).
        """
        if micro_batches == 1 and self.parameters[0].device.type == "cpu":
            return {}
        masters: dict[str, tuple[Tensor, ...]] = getattr(self.model, "matmul_weights", dict)()
        fp8: dict[str, str] = getattr(self.model, "fp8_weights", dict)()
        dtype = getattr(self.model, "compute_dtype", torch.float32)
        if all(part.dtype == dtype for parts in masters.values() for part in parts):
            self._working = None
            return {}
        if self._working is None or (self._working.dtype, self._working.fp8.keys()) != (dtype, fp8.keys()):
            self._working = WorkingWeights(masters, dtype, fp8)
        self._working.refresh()
        return self._working.tensors

    def __call__(
        self, micro_batches: Sequence[MicroBatch], lr_multiplier: float = 1.0, momentum: float | None = None
    ) -> Tensor:
        """Update the model once.

        Args:
            micro_batches: the step's rows.
            lr_multiplier: each group's lr becomes its initial_lr times this.
            momentum: for the groups that have one (Muon's); None leaves it.

        Returns:
            fp32 (3,) on the device: mean loss in nats, gradient norm before clipping, and 1 if the update was
            suppressed because one of the two is not finite, else 0.
        """
        loss = self._forward_backward(micro_batches)
        self.clock.mark("forward+backward")
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        found_inf = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
        if self.grad_clip > 0:
            torch._foreach_mul_(gradients, (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_multiplier
                if momentum is not None and "momentum" in group:
                    group["momentum"] = momentum
            optimizer.found_inf = found_inf
            optimizer.step()
        self._zero_grad()
        self.clock.mark("optimizer")
        return torch.stack([loss, norm, found_inf])

    def fits(self, rows: int, length: int) -> bool:
        """Whether forward and backward of a micro-batch of so many rows fit into memory; leaves nothing behind."""
        device = self.parameters[0].device
        ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        try:
            self._forward_backward([(ids, ids)])
        except torch.OutOfMemoryError:
            return False
        finally:
            self._zero_grad()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def _forward_backward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Leave the gradients of the step's loss in the parameters; return that loss, fp32 scalar."""
        if self._first and self._cuda_graphs:
            self._zero_grad()
        if not (self._first and self.compiled):
            return self._accumulate(micro_batches)
        self._first = False
        self._say("compiling the model (the first step takes a while) ...")
        try:
            return self._accumulate(micro_batches)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the compiler's own failures have no common base class
            if self._must_compile:
                raise
            self._zero_grad()
            self._loss_sum, self.compiled = self._eager_loss_sum, False
            loss = self._accumulate(micro_batches)  # if the model itself is at fault, this raises the real error
            self._say(f"torch.compile failed, training goes on without it: {first_line(error)}")
            return loss

    def _accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        targets_total = torch.stack([(targets >= 0).sum() for _, targets in micro_batches]).sum()
        scale = 1.0 / targets_total.clamp(min=1).float()
        loss: Tensor | None = None
        weights = self._cast_weights(len(micro_batches))
        for inputs, targets in micro_batches:
            if self._cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            nats = self._loss_sum(inputs, targets, weights)
            nats.backward(scale.to(nats.dtype))
            nats = nats.detach().float().clone() if self._cuda_graphs else nats.detach().float()
            loss = nats if loss is None else loss + nats
        assert loss is not None, "a step needs at least one micro-batch"
        return loss * scale

    def _zero_grad(self) -> None:
        if self._cuda_graphs and self.parameters[0].grad is not None:
            torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
            return
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if self._cuda_graphs else None


class Readback:
    """Brings a few numbers from the device to the host without making the host wait until they are asked for."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = numbers
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """The numbers; waits until the device has made them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# state of the optimizers, by parameter name


def optimizer_data(model: torch.nn.Module, optimizers: Sequence[TrainingOptimizer]) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {state: tensor}}: everything that the optimizers remember. No copies are made."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def load_optimizer_data(
    model: torch.nn.Module, optimizers: Sequence[TrainingOptimizer], data: dict[str, dict[str, Tensor]]
) -> None:
    """Put back what `optimizer_data` gave, in place. Raises UserError unless names, states and shapes all agree."""
    here = optimizer_data(model, optimizers)
    for name in here.keys() | data.keys():
        mine = {key: tuple(value.shape) for key, value in here.get(name, {}).items()}
        saved = {key: tuple(value.shape) for key, value in data.get(name, {}).items()}
        if mine != saved:
            raise UserError(
                f"the checkpoint's optimizer state of {name} is {saved or 'missing'}, not {mine or 'expected'}"
            )
    parameters = dict(model.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = next(n for n, p in parameters.items() if p is parameter)
                for key, value in optimizer.state[parameter].items():
                    if isinstance(value, Tensor):
                        value.copy_(data[name][key])
                    else:
                        optimizer.state[parameter][key] = type(value)(data[name][key].item())


def use_deterministic_algorithms() -> None:
    """Make a step's result a pure function of its inputs, bit for bit. On a GPU, call it before the first matmul.

    Inductor's embedding backward adds with atomics without it. Filling fresh memory with NaN, torch's default then,
    would cost time and change nothing here.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def first_line(error: BaseException) -> str:
    """The first line of an exception that says something, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
