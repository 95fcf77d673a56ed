"""What every other module may ask of the machine: device, compute dtype, rank, seeds, base directory, peak FLOP/s.

Importing this module touches no device and reads no arguments; each question is a function.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import random
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class UserError(Exception):
    """A person's mistake or a machine's lack: one line that says what, where and what to do. Programs exit 2 on it."""


# ---------------------------------------------------------------------------------------------------------------------
# where things go


def get_base_dir() -> str:
    """The directory that holds data, tokenizer, checkpoints and runs: `$VIBECHAT_BASE_DIR`, created if missing.

    Raises UserError if it cannot be created.
    """
    path = Path(os.environ.get("VIBECHAT_BASE_DIR") or Path.home() / ".cache" / "vibechat").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the base directory {path}: {error.strerror}; set VIBECHAT_BASE_DIR to a writable one"
        ) from error
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# ranks and devices


def get_dist_info() -> tuple[bool, int, int, int]:
    """(ddp, rank, local_rank, world_size) from torchrun's environment; (False, 0, 0, 1) without it."""
    if "RANK" not in os.environ:
        return False, 0, 0, 1
    try:
        rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK is set but {error} is not a usable RANK, LOCAL_RANK, WORLD_SIZE: start with torchrun, or unset RANK"
        ) from error
    return True, rank, local_rank, world_size


def compute_init(*, device_type: str = "") -> tuple[bool, int, int, int, torch.device]:
    """Choose the device, seed every generator with 42 and set matmul precision; refuse what cannot train correctly.

    Args:
        device_type: "cuda", "mps" or "cpu"; empty takes the best that is there.

    Returns:
        (ddp, rank, local_rank, world_size, device).

    Raises:
        UserError: for more than one rank (gradients are not yet sharded between ranks, so the models would silently
            diverge), and for a device that this machine does not have.
    """
    ddp, rank, local_rank, world_size = get_dist_info()
    if world_size > 1:
        raise UserError(f"{world_size} ranks were started, but only one is supported so far: use --nproc_per_node=1")
    device_type = device_type or autodetect_device_type()
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; run `vibechat doctor`, or use --device cpu")
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Metal device; use --device cpu")
    if device_type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {device_type}: unknown; one of cuda, mps, cpu")
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for the few fp32 matmuls; the rest is bf16
    seed_everything(42)
    return ddp, rank, local_rank, world_size, device


def compute_cleanup() -> None:
    """Leave the process group, if one was entered."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def autodetect_device_type() -> str:
    """ "cuda" where there is one, else "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators, on every device."""
    random.seed(seed)
    torch.manual_seed(seed)


def compile_obstacle(device: torch.device | str) -> str | None:
    """Why torch.compile cannot work on this machine for that kind of device; None if nothing is known to be missing.

    A CPU needs a C++ compiler (`$CXX`, else g++; clang++ on macOS, cl on Windows) and Python's headers, a GPU Triton.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is missing (pip install triton)"
    if kind != "cpu":
        return f"it is untested on {kind}"
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not shutil.which(compiler.split()[0]):
        return f"no C++ compiler was found ({compiler}; apt install g++, or the like, or set CXX)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are missing (apt install python3-dev, or the like)"
    return None


def keep_freed_memory() -> bool:
    """Have the C library keep large blocks when they are freed, and hand them out again. True if it agreed (glibc).

    By default glibc gives every block of more than a few megabytes back to the system and maps fresh, zeroed pages for
    the next one, so that each large tensor page-faults: a 4096 x 256 x 8192 bfloat16 matmul runs at 0.15 TFLOP/s into
    new memory and at 1.4 into reused memory. For programs whose tensors are the same at every step, which is training.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    largest = 2**31 - 1
    kept = mallopt(m_mmap_threshold, largest) or mallopt(m_mmap_threshold, 32 * 2**20)
    return bool(mallopt(m_trim_threshold, largest) and mallopt(m_top_pad, 64 * 2**20) and kept)


def cpu_name() -> str:
    """The processor as the system names it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction-set flags that the kernel reports for the first core; empty where there is no /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of matmuls and activations: bfloat16 where the hardware multiplies it natively, else float32.

    Native means CUDA compute capability 8.0 and later, and CPUs with AMX or AVX512-bf16 (elsewhere bfloat16 is
    emulated and slower than float32). `$VIBECHAT_DTYPE` (bfloat16 or float32) overrides.
    """
    if name := os.environ.get("VIBECHAT_DTYPE"):
        if name not in ("bfloat16", "float32"):
            raise UserError(f"VIBECHAT_DTYPE={name}: must be bfloat16 or float32")
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = bool({"amx_bf16", "avx512_bf16"} & cpu_flags())
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


# Dense bf16 peaks without sparsity, FLOP/s, from the vendors' data sheets. The first name found in the device's wins.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.8e15),
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI325X", 1307.4e12),
    ("MI300X", 1307.4e12),
    ("MI250X", 383e12),
)


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak in FLOP/s of a GPU by the name that torch gives it; None if it is not in the table."""
    return next((peak for name, peak in PEAK_BF16_FLOPS if name.lower() in device_name.lower()), None)


# ---------------------------------------------------------------------------------------------------------------------
# what rank 0 says


def print0(*args: Any, **kwargs: Any) -> None:
    """print, on rank 0 only."""
    if get_dist_info()[1] == 0:
        print(*args, **kwargs)


BANNER = r"""
        _ _               _           _
 __   _(_) |__   ___  ___| |__   __ _| |_
 \ \ / / | '_ \ / _ \/ __| '_ \ / _` | __|
  \ V /| | |_) |  __/ (__| | | | (_| | |_
   \_/ |_|_.__/ \___|\___|_| |_|\__,_|\__|
"""


def print_banner() -> None:
    """Print the name, large, on rank 0 of a terminal."""
    if sys.stdout.isatty():
        print0(BANNER)


class DummyWandb:
    """Stands where a wandb run would when logging to wandb was not asked for."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Forget it."""

    def finish(self) -> None:
        """Nothing to finish."""
