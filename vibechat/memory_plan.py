"""What a training step keeps in memory, by component: a formula, printed before the first step.

For each token and layer the backward needs these values of C channels, in the compute dtype:

    norms       4   the residual stream and its norm, twice; a norm's fp32 rstd is nothing beside them
    attention   6   the packed projection (3: v is a view of it), q and k rotated (2), the output
                +4  eager: q and k in fp32, which their norm is of
    MLP         4   the square of the hidden layer (4 C wide), alone

In fp8 it is 12: the norms are computed again from the residual stream (2), the square from the hidden layer (4). That v
is a view keeps q and k as they were before the rotation alive, 2 values that nobody reads again: to be rid of them v
would have to be copied, or to come from a matmul of its own.

With activation checkpointing a layer keeps its two inputs and one layer at a time has all of the above. The logits are
never all there: a chunk of rows is, with what the softmax of it needs. Not counted: the context of the driver, the
allocator's fragments (SHARE_USABLE leaves room for both), what the optimizer has for a moment when the activations are
gone, and what a CPU keeps beside: in eager 2 values more, as its norms have 16-bit inputs in fp32, and compiled the
exponentiated scores of short rows.
"""

import contextlib
from dataclasses import dataclass

import torch

from vibechat.gpt import GPTConfig
from vibechat.kernels import backend_table

FORMS = ("eager", "compiled", "vibechat", "fp8")
LOGITS_BYTES = {"cuda": 512 * 2**20, "cpu": 16 * 2**20}  # of one chunk: linear_cross_entropy's workspace_mb
SHARE_USABLE = 0.92
LARGEST_ON_CPU = 8  # rows; larger ones were not faster there, and there is no need to fill the memory


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by component; `str(plan)` is the table of it."""

    micro_batch: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the fullest moment, the end of a forward pass."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        unit, name_of_it = (2**30, "GiB") if self.total >= 2**30 else (2**20, "MiB")
        rows = {**self.parts, "memory of a step, as planned": self.total}
        return "\n".join(f"  {name:<38} {size / unit:>8.2f} {name_of_it}" for name, size in rows.items())


def values_per_channel(form: str) -> int:
    """How many values of each channel a layer keeps for each token, in the compute dtype."""
    if form == "fp8":
        return 12
    return 4 + (10 if form == "eager" else 6) + 4


def memory_plan(
    config: GPTConfig,
    micro_batch: int,
    form: str = "vibechat",
    *,
    itemsize: int = 2,
    checkpointing: bool = False,
    optimizer_bytes: int | None = None,
    device_type: str = "cuda",
) -> MemoryPlan:
    """Plan a step of a model.

    Args:
        config: its shape.
        micro_batch: rows.
        form: "eager", "compiled" (torch.compile of the references), "vibechat" (compiled, with kernels) or "fp8"
            (compiled, the blocks' matmuls in fp8).
        itemsize: bytes of a value of the compute dtype.
        checkpointing: activation checkpointing, a block at a time.
        optimizer_bytes: of the optimizers' states; None: Muon for the matrices, AdamW for the rest.
        device_type: whose chunks of logits.
    """
    if form not in FORMS:
        raise ValueError(f"memory_plan: form {form!r} must be one of {', '.join(FORMS)}")
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    tokens = micro_batch * config.sequence_len
    kv_channels = config.n_kv_head * config.head_dim
    matrices = L * (2 * C * C + 2 * C * kv_channels + 8 * C * C)
    a_layer = tokens * C * itemsize * values_per_channel(form)
    activations = 2 * L * tokens * C * itemsize + a_layer if checkpointing else L * a_layer
    if optimizer_bytes is None:
        optimizer_bytes = 4 * (2 * 2 * V * C + matrices)
    logits = min(LOGITS_BYTES.get(device_type, LOGITS_BYTES["cpu"]), max(256, tokens) * V * itemsize)
    widened = 4 if form == "eager" else 1  # fp32 copies of a chunk that are alive together, in chunks of its itemsize
    return MemoryPlan(
        micro_batch,
        {
            "parameters, fp32": 4 * (2 * V * C + matrices),
            "gradients, fp32": 4 * (2 * V * C + matrices),
            "optimizer states, fp32": optimizer_bytes,
            "weights in the compute dtype": itemsize * (V * C + matrices) if itemsize != 4 else 0,
            **({"weights in fp8, and transposed": 2 * matrices} if form == "fp8" else {}),
            "activations kept for the backward": activations,
            "one layer's activations in motion": tokens * 8 * C * itemsize,
            "embedding, last norm and its gradient": 5 * tokens * C * itemsize,
            "logits of a chunk": logits * (1 + widened * 4 // itemsize) + 4 * V * C,
        },
    )


def form_of(*, compiled: bool, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> str:
    """The form of a step on a device, from what the kernels' table says."""
    chosen = {choice.op: choice.backend for choice in backend_table(device, dtype)}
    if compiled and fp8:
        return "fp8"
    if not compiled:
        return "eager" if chosen["qk_norm_rope"] == "torch" else "vibechat"
    return "vibechat" if "triton" in chosen.values() else "compiled"


def total_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device by a process that has it for itself; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_bytes(device)


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


def largest_planned(
    config: GPTConfig,
    form: str,
    rows: int,
    device: torch.device,
    *,
    available: int | None = None,
    checkpointing: bool = False,
    optimizer_bytes: int | None = None,
    itemsize: int = 2,
) -> int:
    """The largest power of two of rows, at most `rows` and at least 1, whose plan fits.

    Args:
        config: the model's shape.
        form: see `memory_plan`.
        rows: of a whole step.
        device: where; a CPU takes LARGEST_ON_CPU at most.
        available: bytes for everything, parameters included; None asks the device.
        checkpointing, optimizer_bytes, itemsize: see `memory_plan`.
    """
    if device.type == "cpu":
        rows = min(rows, LARGEST_ON_CPU)
    available = total_bytes(device) if available is None else available
    size = 1 << (max(1, rows).bit_length() - 1)
    while size > 1 and available is not None:
        planned = memory_plan(
            config,
            size,
            form,
            itemsize=itemsize,
            checkpointing=checkpointing,
            optimizer_bytes=optimizer_bytes,
            device_type=device.type,
        )
        if planned.total <= SHARE_USABLE * available:
            break
        size //= 2
    return size
