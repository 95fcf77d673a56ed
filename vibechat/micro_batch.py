"""`--device-batch-size auto`: the largest micro-batch that fits, from a memory model, checked by one trial step.

What a row of T tokens keeps for the backward is, in each layer, about 20 C values of the compute dtype: the residual
stream and its norm twice (4 C), q, k, v and the attention's output (4 C), the MLP's 4 C before and after its activation
(8 C), and what is alive for a moment (4 C). Gradients come on top; optimizer states are allocated already. The head's
logits do not count: they are never all there.
"""

import contextlib

import torch

from vibechat.common import UserError, compute_dtype
from vibechat.gpt import GPT, GPTConfig

VALUES_PER_CHANNEL = 20
LARGEST_ON_CPU = 8  # rows; larger ones were not faster there, and there is no need to fill the memory
MEMORY_SHARE = 0.85  # of what is free; fragments and what other libraries take need the rest


def row_bytes(config: GPTConfig, bytes_per_value: int) -> int:
    """What one row of a micro-batch keeps for the backward."""
    return config.sequence_len * config.n_layer * VALUES_PER_CHANNEL * config.n_embd * bytes_per_value


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where nobody says."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def check_memory(num_params: int, device: torch.device) -> None:
    """Raises UserError where the fp32 parameters, their gradients and one optimizer state a parameter cannot fit."""
    free, needed = free_bytes(device), 12 * num_params
    if free is not None and needed > free:
        raise UserError(
            f"{num_params:,} parameters need {needed / 1e9:.1f} GB with gradients and optimizer states, "
            f"{free / 1e9:.1f} GB are free on {device}: choose a smaller --depth"
        )


def predicted_micro_batch(model: GPT, rows: int, free: int | None) -> int:
    """The largest power of two of rows, at least 1 and at most `rows`, that `free` bytes hold by the memory model."""
    fitting = rows
    if free is not None:
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        spare = MEMORY_SHARE * free - gradients
        fitting = min(rows, int(spare // row_bytes(model.config, compute_dtype(model.get_device()).itemsize)))
    return 1 << max(0, fitting.bit_length() - 1) if fitting > 0 else 1


def largest_micro_batch(model: GPT, rows: int, device: torch.device) -> int:
    """How many of a step's `rows` to take at a time; on CUDA a forward and backward checks it, halving if need be.

    Parameters and gradients are left as they were. Raises UserError if not even one row fits.
    """
    if device.type != "cuda":
        return predicted_micro_batch(model, min(rows, LARGEST_ON_CPU), free_bytes(device))
    size = predicted_micro_batch(model, rows, free_bytes(device))
    while size >= 1:
        if _fits(model, size, device):
            return size
        size //= 2
    raise UserError("not even one row fits into the memory of the GPU: choose a smaller --depth or --max-seq-len")


def _fits(model: GPT, rows: int, device: torch.device) -> bool:
    try:
        ids = torch.zeros(rows, model.config.sequence_len, dtype=torch.long, device=device)
        model(ids, ids, loss_reduction="sum").backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
