"""Say what this machine has, what is wrong with it and what to do.

Every fact is gathered by a small function that survives the lack of what it asks about: a doctor must not fall ill
with the patient. The exit status is 0 unless something makes training impossible; then it is 1.
"""

import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import vibechat
from vibechat.configurator import run_program

# module -> what is lost without it; all of them are installed by `make setup`
PACKAGES = {
    "filelock": "the lock on a run",
    "huggingface_hub": "downloads",
    "matplotlib": "plots in reports",
    "pyarrow": "parquet files",
    "rich": "the progress display",
    "safetensors": "checkpoints",
    "tiktoken": "encoding text",
    "tokenizers": "the alternative tokenizer",
    "tyro": "command lines",
}
ESSENTIAL = ("safetensors", "tyro")
LITTLE_DISK_BYTES = 5 * 2**30
NO_DISK_BYTES = 256 * 2**20
VARIABLES = (
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HTTPS_PROXY",
    "VIBECHAT_DTYPE",
    "VIBECHAT_KERNELS",
)
SECRETS = ("HF_TOKEN",)


@dataclass(frozen=True)
class Config:
    """What `vibechat doctor` takes."""

    json: bool = False
    """print one JSON object in place of the page"""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and what to do about it."""

    severity: Literal["error", "warning", "note"]
    """error: training is impossible; warning: something is lost or slow; note: worth knowing"""
    what: str
    advice: str


@dataclass
class Examination:
    """What has been found out so far."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    """{heading: {label: value}}"""
    findings: list[Finding] = field(default_factory=list)

    def note(self, heading: str, label: str, value: str) -> None:
        """Write down one fact."""
        self.facts.setdefault(heading, {})[label] = value

    def find(self, severity: Literal["error", "warning", "note"], what: str, advice: str) -> None:
        """Write down one thing that is wrong."""
        self.findings.append(Finding(severity, what, advice))


# ---------------------------------------------------------------------------------------------------------------------
# the machine


def examine_system(exam: Examination) -> None:
    """Python and the operating system."""
    exam.note("Software", "vibechat", vibechat.__version__)
    exam.note("Software", "Python", f"{platform.python_version()} ({sys.executable})")
    exam.note("Software", "system", f"{platform.system()} {platform.release()} on {platform.machine()}")
    if platform.system() in ("Darwin", "Windows"):
        name = "macOS" if platform.system() == "Darwin" else "Windows"
        exam.find(
            "warning",
            f"{name} is untested: vibechat is developed and tested on Linux",
            "everything but the Triton kernels and the sandbox is meant to work; please report what does not",
        )


def examine_packages(exam: Examination) -> None:
    """The packages that vibechat needs, and its own compiled extension."""
    missing = [name for name in PACKAGES if not installed(name)]
    exam.note("Software", "packages", f"missing: {', '.join(missing)}" if missing else "complete")
    for name in missing:
        severity: Literal["error", "warning"] = "error" if name in ESSENTIAL else "warning"
        exam.find(
            severity, f"{name} is not installed: without it no {PACKAGES[name]}", f"make setup, or pip install {name}"
        )
    extension = installed("vibechat._rustbpe")
    exam.note("Software", "Rust extension", "present" if extension else "missing")
    if not extension:
        advice = (
            "make setup" if shutil.which("cargo") else "install Rust (rustup.rs or your distribution), then make setup"
        )
        exam.find("warning", "the Rust extension is not built: no tokenizer can be trained", advice)


def examine_torch(exam: Examination) -> None:
    """PyTorch, Triton, the GPU, and what the model would compute in."""
    try:
        import torch
    except Exception as error:  # whatever keeps torch from loading: a missing package, a missing library
        exam.note("Software", "torch", f"cannot be imported: {first_line(error)}")
        exam.find("error", f"torch cannot be imported ({first_line(error)})", "make setup, or pip install torch")
        return
    backend = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    exam.note(
        "Software", "torch", f"{torch.__version__} ({f'ROCm {torch.version.hip}' if torch.version.hip else backend})"
    )
    gpu = torch.cuda.is_available()
    exam.note("Software", "Triton", _triton(exam, gpu))
    if gpu:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            exam.note("Compute", f"GPU {index}", f"{properties.name}, {memory}, capability {capability}")
        if torch.cuda.get_device_capability(0) < (8, 0):
            exam.find(
                "warning", "this GPU has no bfloat16 units: training runs in float32", "use Ampere (8.0) or later"
            )
    elif torch.backends.mps.is_available():
        exam.note("Compute", "GPU", "Apple Metal (untested)")
    else:
        exam.note("Compute", "GPU", _why_no_gpu(exam, bool(torch.version.cuda or torch.version.hip)))
    threads = f"{torch.get_num_threads()} of {available_cores()} cores"
    if value := os.environ.get("OMP_NUM_THREADS"):
        threads += f" (OMP_NUM_THREADS={value})"
    exam.note("Compute", "torch threads", threads)
    _examine_choices(exam)


def _triton(exam: Examination, gpu: bool) -> str:
    if platform.system() != "Linux":
        return "not available here: the fused kernels run as plain PyTorch"
    if not installed("triton"):
        if gpu:
            exam.find(
                "warning", "Triton is missing: the fused kernels run as plain PyTorch, slower", "pip install triton"
            )
        return "not installed"
    try:
        import triton
    except Exception as error:
        exam.find("warning", f"Triton cannot be imported ({first_line(error)})", "reinstall it: make setup")
        return "installed, but it cannot be imported"
    return f"{triton.__version__}" + ("" if gpu else " (idle: it needs a GPU)")


def _why_no_gpu(exam: Examination, built_for_gpu: bool) -> str:
    """Tell a machine without a GPU from one whose GPU torch cannot use."""
    if shutil.which("nvidia-smi") is None:
        return "none: a small model trains on the CPU"
    listing = run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    if listing is None:
        return "none, although nvidia-smi is installed"
    name = listing.partition("\n")[0]
    if built_for_gpu:
        advice = "update the NVIDIA driver, or check CUDA_VISIBLE_DEVICES"
        exam.find("warning", f"there is a {name}, but torch cannot use it", advice)
    else:
        advice = "install a CUDA build of torch (pytorch.org/get-started)"
        exam.find("warning", f"there is a {name}, but this torch is built for CPUs only", advice)
    return f"{name}, which torch cannot use"


def _examine_choices(exam: Examination) -> None:
    """What vibechat itself decides here: device, dtype, compilation, kernels, attention."""
    import torch

    from vibechat.attention import attention_backend
    from vibechat.common import UserError, autodetect_device_type, compile_obstacle, compute_dtype

    device = torch.device(autodetect_device_type())
    try:
        dtype = compute_dtype(device)
    except UserError as error:
        exam.find("error", str(error), "unset the variable or correct it")
        return
    exam.note("Compute", "dtype", f"{str(dtype).removeprefix('torch.')} on {device.type}")
    if device.type == "cpu" and dtype == torch.float32 and not os.environ.get("VIBECHAT_DTYPE"):
        exam.find(
            "note", "this CPU does not multiply bfloat16 natively: training runs in float32", "nothing to be done"
        )
    obstacle = compile_obstacle(device)
    exam.note("Compute", "torch.compile", f"cannot be used: {obstacle}" if obstacle else "can be used")
    if obstacle:
        exam.find("warning", f"torch.compile cannot be used: {obstacle}", "training works without it, slower")
    exam.note("Compute", "attention", attention_backend(device, dtype))
    try:
        kernels = importlib.import_module("vibechat.kernels")
        choices = kernels.backend_table(device, dtype)
    except ImportError:
        return
    except ValueError as error:  # VIBECHAT_KERNELS asks for what cannot be had, or measurements are damaged
        exam.find("error", str(error), "unset VIBECHAT_KERNELS, or set it to auto or torch")
        return
    if advice := kernels.tuning_advice(choices):
        what = "kernels that nobody measured on this GPU are not used: training is slower than it could be"
        exam.find("warning", what, advice)
    ops: dict[str, list[str]] = {}
    for choice in choices:
        ops.setdefault(f"{choice.backend} ({choice.reason})", []).append(choice.op)
    for index, (backend, names) in enumerate(ops.items()):
        which = "every op" if len(ops) == 1 else ", ".join(names)
        exam.note("Compute", "kernels" if index == 0 else f"kernels {index + 1}", f"{backend}: {which}")


def examine_cpu(exam: Examination) -> None:
    """Cores, instruction sets and memory."""
    exam.note("Compute", "CPU", f"{cpu_name()}, {available_cores()} of {os.cpu_count()} cores")
    flags = cpu_flags()
    wanted = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-bf16", "avx512f": "AVX512", "avx2": "AVX2"}
    if flags:
        exam.note(
            "Compute", "instructions", ", ".join(name for flag, name in wanted.items() if flag in flags) or "basic"
        )
    memory = memory_bytes()
    if memory is not None:
        exam.note("Compute", "memory", f"{memory[1] / 2**30:.1f} GiB, {memory[0] / 2**30:.1f} GiB free")
        if memory[0] < 2 * 2**30:
            exam.find(
                "warning", "less than 2 GiB of memory is free", "close something, or train a smaller model (--depth 2)"
            )


# ---------------------------------------------------------------------------------------------------------------------
# the place and its surroundings


def examine_base_dir(exam: Examination) -> None:
    """Where models and data go: can it be written, is there room, what is there."""
    chosen = "VIBECHAT_BASE_DIR" if os.environ.get("VIBECHAT_BASE_DIR") else "default"
    path = Path(os.environ.get("VIBECHAT_BASE_DIR") or Path.home() / ".cache" / "vibechat").expanduser()
    exam.note("Place", "base directory", f"{path} ({chosen})")
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        exam.find("error", f"{path} cannot be written", "set VIBECHAT_BASE_DIR to a directory of yours")
        return
    free = shutil.disk_usage(existing).free
    exam.note("Place", "disk free", f"{free / 2**30:.1f} GiB")
    if free < NO_DISK_BYTES:
        exam.find(
            "error", f"only {free / 2**20:.0f} MiB of disk are free at {path}", "make room, or set VIBECHAT_BASE_DIR"
        )
    elif free < LITTLE_DISK_BYTES:
        exam.find("warning", f"only {free / 2**30:.1f} GiB of disk are free at {path}", "enough for small models only")
    exam.note("Place", "tokenizer", _tokenizer(exam, path / "tokenizer"))
    tags = sorted(p.parent.name + "/" + p.name for p in path.glob("*_checkpoints/*") if any(p.glob("step_*")))
    exam.note("Place", "models", ", ".join(tags) if tags else "none yet: vibechat train")


def _tokenizer(exam: Examination, directory: Path) -> str:
    if not directory.is_dir():
        return "none yet: the first training makes one"
    try:
        tokenizer = importlib.import_module("vibechat.tokenizer").get_tokenizer(directory=str(directory))
        return f"{tokenizer.get_vocab_size():,} tokens"
    except Exception as error:
        exam.find(
            "warning", f"the tokenizer cannot be loaded: {first_line(error)}", f"delete {directory}; vibechat tok-train"
        )
        return "damaged"


def examine_sandbox(exam: Examination) -> None:
    """Whether code that a model wrote can be shut in: bubblewrap, or at least user namespaces."""
    if platform.system() != "Linux":
        exam.note("Place", "sandbox", "none on this system: do not let a model run code here")
        return
    arguments = ["--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "true"]
    bubblewrap = shutil.which("bwrap") is not None and run(["bwrap", *arguments]) is not None
    namespaces = (
        shutil.which("unshare") is not None and run(["unshare", "--user", "--map-root-user", "true"]) is not None
    )
    if bubblewrap:
        exam.note("Place", "sandbox", "bubblewrap")
    elif namespaces:
        exam.note("Place", "sandbox", "user namespaces (bubblewrap is not usable)")
    else:
        exam.note("Place", "sandbox", "none: neither bubblewrap nor user namespaces work")
        advice = "apt install bubblewrap; in a container, allow user namespaces"
        exam.find("note", "code that a model wrote cannot be isolated from this machine", advice)


def examine_variables(exam: Examination) -> None:
    """Environment variables that change what vibechat does; secrets are named and not shown."""
    for name in VARIABLES:
        if value := os.environ.get(name):
            exam.note("Variables", name, "set" if name in SECRETS else value)


# ---------------------------------------------------------------------------------------------------------------------
# small questions


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def run(command: list[str]) -> str | None:
    """What a command printed, or None if it is missing, fails or does not end in ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def available_cores() -> int:
    """The cores that this process may use: its affinity, and a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets; empty where they, or torch, are unknown."""
    try:
        from vibechat.common import cpu_flags as flags

        return flags()
    except Exception:  # common needs torch
        return frozenset()


def memory_bytes() -> tuple[int, int] | None:
    """(free, total) bytes of memory, a container's limit counted; None where nobody tells."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(free, max(limit - used, 0)), min(total, limit)
    except (OSError, ValueError):
        return free, total


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its name."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# the page

EXAMINATIONS: tuple[Callable[[Examination], None], ...] = (
    examine_system,
    examine_torch,
    examine_packages,
    examine_cpu,
    examine_base_dir,
    examine_sandbox,
    examine_variables,
)


def examine() -> Examination:
    """Ask every question; one that fails is itself a finding."""
    exam = Examination()
    for ask in EXAMINATIONS:
        try:
            ask(exam)
        except Exception as error:
            exam.find("warning", f"{ask.__name__} failed: {first_line(error)}", "please report this")
    return exam


def print_page(exam: Examination) -> None:
    """One screen: the facts by heading, then what is wrong, the worst first."""
    colourful = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def styled(text: str, code: int) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colourful else text

    for heading, facts in exam.facts.items():
        print(styled(heading, 1))
        for label, value in facts.items():
            print(f"  {styled(f'{label:<18}', 2)}{value}")
    print()
    for severity, code in {"error": 31, "warning": 33, "note": 36}.items():
        for finding in exam.findings:
            if finding.severity == severity:
                print(f"{styled(severity + ':', code)} {finding.what}; {finding.advice}")
    print(verdict(exam))


def verdict(exam: Examination) -> str:
    """The last line."""
    if any(finding.severity == "error" for finding in exam.findings):
        return "This machine cannot train until the errors above are gone."
    if exam.findings:
        return "This machine can train."
    return "This machine can train, and nothing is wrong."


def doctor(config: Config) -> int:
    """Examine, print, and return 1 if training is impossible."""
    exam = examine()
    if config.json:
        findings = [asdict(finding) for finding in exam.findings]
        print(json.dumps({"facts": exam.facts, "findings": findings, "verdict": verdict(exam)}, indent=2))
    else:
        print_page(exam)
    return int(any(finding.severity == "error" for finding in exam.findings))


def main(argv: list[str] | None = None) -> int:
    """Read the command line, examine the machine, return the exit status."""
    return run_program(doctor, Config, argv, prog="vibechat doctor", description=(__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    raise SystemExit(main())
