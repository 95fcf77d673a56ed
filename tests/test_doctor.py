"""The doctor: what it says on machines that lack things, and that nothing makes it fall ill."""

import builtins
import json
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import vibechat
from vibechat import common
from vibechat.programs import doctor
from vibechat.programs.doctor import Examination, examine, main, memory_bytes, print_page, verdict


def whats(exam: Examination, severity: str | None = None) -> str:
    return "\n".join(f"{f.what}; {f.advice}" for f in exam.findings if severity in (None, f.severity))


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """A machine on which these modules are not installed."""
    original_import, original_installed = builtins.__import__, doctor.installed

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in modules:
            raise ImportError(f"No module named {name!r}")
        return original_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(doctor, "installed", lambda name: name not in modules and original_installed(name))


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str], base_dir: Path) -> None:
    assert main([]) == 0
    page = capsys.readouterr().out
    for words in (
        f"vibechat          {vibechat.__version__}",
        platform.python_version(),
        torch.__version__,
        str(base_dir),
    ):
        assert words in page
    for label in ("Triton", "GPU", "dtype", "memory", "disk free", "sandbox", "tokenizer", "torch.compile", "CPU"):
        assert f"\n  {label}" in page
    assert "This machine can train" in page
    assert "please report this" not in page
    assert len(page.splitlines()) <= 40, "one screen"
    assert "\x1b" not in page
    assert all(line == line.rstrip() for line in page.splitlines())


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["facts"]["Software"]["vibechat"] == vibechat.__version__
    assert data["verdict"].startswith("This machine can train")
    assert all(set(finding) == {"severity", "what", "advice"} for finding in data["findings"])


def test_without_torch_training_is_impossible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "torch")
    assert main([]) == 1
    page = capsys.readouterr().out
    assert "error: torch cannot be imported (No module named 'torch'); make setup" in page
    assert "cannot train until" in page
    assert "\n  memory" in page  # the rest is still examined


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "triton")
    exam = examine()
    assert exam.facts["Software"]["Triton"] == "not installed"
    assert "riton" not in whats(exam)  # on a machine without a GPU nothing is lost
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    exam = Examination()
    assert doctor._triton(exam, gpu=True) == "not installed"
    assert "slower; pip install triton" in whats(exam, "warning")


def test_a_triton_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "triton")
    monkeypatch.setattr(doctor, "installed", lambda name: True)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    exam = Examination()
    assert "cannot be imported" in doctor._triton(exam, gpu=False)
    assert "make setup" in whats(exam, "warning")


@pytest.mark.parametrize(("system", "name"), [("Darwin", "macOS"), ("Windows", "Windows")])
def test_other_systems_are_called_untested(monkeypatch: pytest.MonkeyPatch, system: str, name: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    exam = examine()
    assert f"{name} is untested" in whats(exam, "warning")
    assert "plain PyTorch" in exam.facts["Software"]["Triton"]
    assert "none on this system" in exam.facts["Place"]["sandbox"]
    assert not whats(exam, "error")


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        (None, "this torch is built for CPUs only; install a CUDA build"),
        ("13.0", "torch cannot use it; update the NVIDIA"),
    ],
)
def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, cuda: str | None, words: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "run", lambda command: "NVIDIA H100" if command[0] == "nvidia-smi" else "")
    exam = examine()
    assert f"there is a NVIDIA H100, but {words}" in whats(exam, "warning")
    assert exam.facts["Compute"]["GPU"] == "NVIDIA H100, which torch cannot use"


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "Tesla V100", 7, 0, 16 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    asked: list[torch.dtype] = []
    monkeypatch.setattr("vibechat.attention.attention_backend", lambda device, dtype: asked.append(dtype) or "math")
    exam = Examination()
    doctor.examine_torch(exam)
    assert exam.facts["Compute"]["GPU 0"] == "Tesla V100, 16 GiB, capability 7.0"
    assert exam.facts["Compute"]["dtype"] == "float32 on cuda"
    assert "no bfloat16" in whats(exam, "warning")
    assert exam.facts["Compute"]["attention"] == "math"
    assert asked == [torch.float32], "asked of a dtype that this GPU does not train in"


def test_what_torch_compile_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "compile_obstacle", lambda device: None)
    exam = Examination()
    doctor.examine_torch(exam)
    assert exam.facts["Compute"]["torch.compile"] == "can be used"
    assert "torch.compile" not in whats(exam, "warning")
    monkeypatch.setattr(common, "compile_obstacle", lambda device: "no C++ compiler was found")
    exam = Examination()
    doctor.examine_torch(exam)
    assert exam.facts["Compute"]["torch.compile"] == "cannot be used: no C++ compiler was found"
    assert "torch.compile cannot be used: no C++ compiler was found" in whats(exam, "warning")


@pytest.mark.parametrize(("module", "severity"), [("safetensors", "error"), ("matplotlib", "warning")])
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, module: str, severity: str) -> None:
    without(monkeypatch, module)
    exam = Examination()
    doctor.examine_packages(exam)
    assert f"{module} is not installed" in whats(exam, severity)
    assert exam.facts["Software"]["packages"] == f"missing: {module}"


@pytest.mark.parametrize(("cargo", "advice"), [(None, "install Rust"), ("/usr/bin/cargo", "; make setup")])
def test_a_missing_rust_extension(monkeypatch: pytest.MonkeyPatch, cargo: str | None, advice: str) -> None:
    without(monkeypatch, "vibechat._rustbpe")
    monkeypatch.setattr(shutil, "which", lambda name: cargo)
    exam = Examination()
    doctor.examine_packages(exam)
    assert advice in whats(exam, "warning")


def test_a_base_directory_that_is_a_file(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base_dir.write_text("in the way")
    assert main([]) == 1
    assert f"error: {base_dir} cannot be written; set VIBECHAT_BASE_DIR" in capsys.readouterr().out


def test_examining_creates_nothing(base_dir: Path) -> None:
    examine()
    assert not base_dir.exists()


@pytest.mark.parametrize(("free", "severity"), [(2**20, "error"), (2**30, "warning")])
def test_little_disk(monkeypatch: pytest.MonkeyPatch, free: int, severity: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - free, free))
    exam = Examination()
    doctor.examine_base_dir(exam)
    assert "of disk are free" in whats(exam, severity)


def test_a_damaged_tokenizer(base_dir: Path) -> None:
    (base_dir / "tokenizer").mkdir(parents=True)
    exam = Examination()
    doctor.examine_base_dir(exam)
    assert exam.facts["Place"]["tokenizer"] == "damaged"
    assert "vibechat tok-train" in whats(exam, "warning")


def test_models_are_listed(base_dir: Path) -> None:
    (base_dir / "base_checkpoints/d4/step_000100").mkdir(parents=True)
    (base_dir / "base_checkpoints/empty").mkdir(parents=True)
    exam = Examination()
    doctor.examine_base_dir(exam)
    assert exam.facts["Place"]["models"] == "base_checkpoints/d4"


@pytest.mark.parametrize(
    ("working", "words"),
    [(("bwrap", "unshare"), "bubblewrap"), (("unshare",), "user namespaces"), ((), "none: neither")],
)
def test_the_sandbox(monkeypatch: pytest.MonkeyPatch, working: tuple[str, ...], words: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "run", lambda command: "" if command[0] in working else None)
    exam = Examination()
    doctor.examine_sandbox(exam)
    assert exam.facts["Place"]["sandbox"].startswith(words)
    assert bool(exam.findings) == (not working)


def test_variables_are_shown_and_secrets_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    main([])
    page = capsys.readouterr().out
    assert "http://127.0.0.1:9" in page
    assert "HF_TOKEN          set" in page
    assert "verysecret" not in page


@pytest.mark.parametrize(("name", "value"), [("VIBECHAT_DTYPE", "float7"), ("VIBECHAT_KERNELS", "magic")])
def test_a_wrong_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr("vibechat.kernels.backend._requested", {})  # as in a new process
    monkeypatch.setenv(name, value)
    exam = Examination()
    doctor.examine_torch(exam)
    assert value in whats(exam, "error")


def test_kernels_are_listed_by_what_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Choice(NamedTuple):
        op: str
        backend: str
        reason: str

    choices = [Choice("a", "torch", "no kernel"), Choice("b", "triton", "fastest"), Choice("c", "torch", "no kernel")]
    kernels = types.ModuleType("vibechat.kernels")
    kernels.tuning_advice = lambda found: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vibechat.kernels", kernels)
    for found, expected in (
        (choices, {"kernels": "torch (no kernel): a, c", "kernels 2": "triton (fastest): b"}),
        (choices[:1], {"kernels": "torch (no kernel): every op"}),
    ):
        kernels.backend_table = lambda device, dtype, found=found: found  # type: ignore[attr-defined]
        exam = Examination()
        doctor.examine_torch(exam)
        assert {k: v for k, v in exam.facts["Compute"].items() if k.startswith("kernels")} == expected


def test_a_question_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(exam: Examination) -> None:
        """Fail."""
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "EXAMINATIONS", (ask, doctor.examine_system))
    exam = examine()
    assert "ask failed: no such thing" in whats(exam, "warning")
    assert exam.facts["Software"]["vibechat"] == vibechat.__version__


def test_the_worst_comes_first_and_nothing_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    exam = Examination()
    assert verdict(exam).endswith("nothing is wrong.")
    exam.find("note", "c", "c")
    exam.find("warning", "b", "b")
    assert verdict(exam) == "This machine can train."
    exam.find("error", "a", "a")
    print_page(exam)
    page = capsys.readouterr().out
    assert (
        page.index("error: a; a") < page.index("warning: b; b") < page.index("note: c; c") < page.index("cannot train")
    )


def test_memory_and_commands() -> None:
    memory = memory_bytes()
    assert memory is None or 0 <= memory[0] <= memory[1]
    assert doctor.run(["definitely-not-a-command"]) is None
    assert doctor.run(["false"]) is None
    assert doctor.run(["echo", "yes"]) == "yes"


def test_a_command_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: Any, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("x", kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert doctor.run(["nvidia-smi"]) is None
