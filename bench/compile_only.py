"""Compile Triton kernels for a GPU that is not there, through their own launchers, and read what the compiler made.

    with compile_only() as kernels:                                                              # sm_90
        launch_forward(torch.empty(1, 65536, 1664, dtype=torch.bfloat16, device="meta"), None, 1e-6)
    print(statistics(kernels[-1]))

A meta tensor has a shape and no data, so each launch in the block is compiled and none is run. Call launchers, not
ops: a meta tensor that passes through a custom op meets the op's fake kernel. The process must be one without
$TRITON_INTERPRET, since Triton decides when a kernel is decorated whether it can be compiled at all.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200: the one that tests hold to the budgets
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "sm_120": GPUTarget("cuda", 120, 32),  # RTX 50
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
HOPPER_BLOCK_BYTES = 232_448  # shared memory that one block may use on sm_90
HOPPER_SM_BYTES = 233_472  # that the blocks on one SM share, 1,024 of each reserved
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class CompileOnlyDriver:
    """Answers Triton's questions about the device to compile for, and has nothing to launch on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        """A key of Triton's in-memory cache, which does not know the target: without it a target gets another's."""
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @property
    def utils(self) -> Any:
        raise RuntimeError("compile_only: nothing can be launched")


@contextlib.contextmanager
def compile_only(target: GPUTarget = TARGETS["sm_90"]) -> Iterator[list[Any]]:
    """A list that receives the CompiledKernel of each launch in the block; equal specializations are one object."""
    compiled: list[Any] = []
    run, tune, before = JITFunction.run, Autotuner.run, driver._active

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    def compile_every_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("warmup", None)
        return self.warmup(*args, **kwargs)[0]

    driver.set_active(CompileOnlyDriver(target))
    JITFunction.run, Autotuner.run = compile_instead, compile_every_config
    try:
        yield compiled
    finally:
        JITFunction.run, Autotuner.run, driver._active = run, tune, before


class Statistics(NamedTuple):
    """What ptxas made of one kernel for an NVIDIA target."""

    registers: int
    """a thread"""
    stack: int
    """bytes a thread; above zero, registers were spilled"""
    shared: int
    """bytes a block"""
    warps: int
    """of a block"""
    occupancy: int
    """blocks that fit on an SM of sm_90 by registers, shared memory and warps"""
    wgmma: int
    """Hopper's matrix instructions, which read shared memory"""
    mma: int
    """the older ones, which read registers: a fraction of Hopper's rate"""
    tma_loads: int
    """tiles that the TMA unit fetches"""
    tma_stores: int
    """tiles that it writes"""
    wide_loads: int
    """128-bit loads from global memory"""
    wide_stores: int
    """128-bit stores to global memory"""
    spills: int
    """loads and stores of local memory"""


def occupancy(registers: int, shared: int, warps: int) -> int:
    """Blocks on one SM of sm_90: 65,536 registers handed out in eights a thread, shared memory, 64 warps."""
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, HOPPER_SM_BYTES // (shared + 1024), 64 // warps, 32)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def statistics(kernel: Any) -> Statistics:
    """Registers, memory and instruction counts of a CompiledKernel for an NVIDIA target, from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = int(found[1]), int(found[2])
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Statistics(
        registers=registers,
        stack=stack,
        shared=shared,
        warps=warps,
        occupancy=occupancy(registers, shared, warps),
        wgmma=count(r"\b[HQIB]GMMA\b"),
        mma=count(r"\b[HQIBD]MMA\b"),
        tma_loads=count(r"\bUTMALDG\b"),
        tma_stores=count(r"\bUTMASTG\b"),
        wide_loads=count(r"\bLDG\.E\S*\.128"),
        wide_stores=count(r"\bSTG\.E\S*\.128"),
        spills=count(r"\b(?:STL|LDL)\b"),
    )
