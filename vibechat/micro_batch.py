"""`--device-batch-size auto`: the largest micro-batch that the memory plan says fits, checked by one trial step."""

import torch

from vibechat.common import UserError
from vibechat.gpt import GPT
from vibechat.memory_plan import MemoryPlan, form_of, free_bytes, largest_planned, memory_plan
from vibechat.train_step import TrainStep

OUT_OF_MEMORY_SAID = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def check_memory(num_params: int, device: torch.device) -> None:
    """Raises UserError where the fp32 parameters, their gradients and one optimizer state a parameter cannot fit."""
    free, needed = free_bytes(device), 12 * num_params
    if free is not None and needed > free:
        raise UserError(
            f"{num_params:,} parameters need {needed / 1e9:.1f} GB with gradients and optimizer states, "
            f"{free / 1e9:.1f} GB are free on {device}: choose a smaller --depth"
        )


def state_bytes(step: TrainStep) -> int:
    """What the optimizers' states hold."""
    states = [value for optimizer in step.optimizers for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))


def _form(model: GPT, step: TrainStep) -> str:
    fp8 = bool(model.fp8_weights())
    return form_of(compiled=step.compiled, device=model.get_device(), dtype=model.compute_dtype, fp8=fp8)


def plan_of(model: GPT, step: TrainStep, rows: int) -> MemoryPlan:
    """The memory plan of a step of this model, as it is compiled and with the kernels that run, at `rows` rows."""
    device = model.get_device()
    form = _form(model, step)
    return memory_plan(
        model.config,
        rows,
        form,
        itemsize=model.compute_dtype.itemsize,
        checkpointing=model.activation_checkpointing,
        optimizer_bytes=state_bytes(step),
        device_type=device.type,
    )


def predicted_micro_batch(model: GPT, step: TrainStep, rows: int, free: int | None) -> int:
    """The largest power of two of rows, at least 1 and at most `rows`, whose plan `free` more bytes make room for."""
    device = model.get_device()
    form = _form(model, step)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return largest_planned(
        model.config,
        form,
        rows,
        device,
        available=None if free is None else free + held + state_bytes(step),
        checkpointing=model.activation_checkpointing,
        optimizer_bytes=state_bytes(step),
        itemsize=model.compute_dtype.itemsize,
    )


def largest_micro_batch(model: GPT, step: TrainStep, rows: int) -> int:
    """How many of a step's `rows` to take at a time; on CUDA a forward and backward checks it, halving if need be.

    Parameters and gradients are left as they were. Raises UserError if not even one row fits.
    """
    device = model.get_device()
    size = predicted_micro_batch(model, step, rows, free_bytes(device))
    if device.type != "cuda":
        return size
    while size >= 1:
        if step.fits(size, model.config.sequence_len):
            return size
        size //= 2
    raise UserError(
        "not even one row fits into the memory of the GPU: choose a smaller --depth or --max-seq-len, or add "
        "--activation-checkpointing"
    )


def out_of_memory(model: GPT, step: TrainStep, rows: int) -> UserError:
    """What to say when a step of `rows` rows did not fit: the flag, and the value to try."""
    planned = plan_of(model, step, rows).total / 2**30
    if rows > 1:
        smaller = min(rows // 2, predicted_micro_batch(model, step, rows // 2, free_bytes(model.get_device())))
        advice = f"--device-batch-size {smaller} (or auto)"
    else:
        advice = "a smaller --depth or --max-seq-len"
    if not model.activation_checkpointing:
        advice += ", or --activation-checkpointing, which keeps less and computes more"
    return UserError(f"out of memory with --device-batch-size {rows} (planned: {planned:.1f} GiB): try {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: PyTorch's on a GPU has a type of its own; a CPU's, a library's or the compiler's is
    a RuntimeError like any other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_SAID)
