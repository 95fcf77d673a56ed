"""What the machine is asked: rank, device, base directory, dtype, peak, and what torch.compile lacks."""

import random
import sysconfig
from pathlib import Path

import pytest
import torch

from vibechat import common
from vibechat.common import (
    PEAK_BF16_FLOPS,
    DummyWandb,
    UserError,
    compile_obstacle,
    compute_cleanup,
    compute_dtype,
    compute_init,
    get_base_dir,
    get_dist_info,
    keep_freed_memory,
    peak_flops,
    print0,
    print_banner,
    seed_everything,
)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without torchrun, and on a CPU that multiplies bfloat16."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "VIBECHAT_DTYPE"):
        monkeypatch.delenv(name, raising=False)


def ranks(monkeypatch: pytest.MonkeyPatch, rank: object, world_size: object) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
        monkeypatch.setenv(name, str(value))


# ---------------------------------------------------------------------------------------------------------------------
# places


def test_the_base_directory_is_made(base_dir: Path) -> None:
    assert not base_dir.exists()
    assert get_base_dir() == str(base_dir)
    assert base_dir.is_dir()


def test_without_a_variable_it_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIBECHAT_BASE_DIR", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert get_base_dir() == str(tmp_path / ".cache/vibechat")


def test_a_base_directory_that_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIBECHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(UserError, match=r"cannot create the base directory .*; set VIBECHAT_BASE_DIR"):
        get_base_dir()


# ---------------------------------------------------------------------------------------------------------------------
# ranks and devices


def test_ranks_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_dist_info() == (False, 0, 0, 1)
    ranks(monkeypatch, 3, 4)
    assert get_dist_info() == (True, 3, 3, 4)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="start with torchrun, or unset RANK"):
        get_dist_info()


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without exchanging gradients they would train models that differ, and nobody would see it."""
    ranks(monkeypatch, 0, 1)
    assert compute_init(device_type="cpu") == (True, 0, 0, 1, torch.device("cpu"))
    compute_cleanup()
    for rank in (0, 1):
        ranks(monkeypatch, rank, 2)
        with pytest.raises(UserError, match="2 ranks were started, but only one is supported so far"):
            compute_init(device_type="cpu")


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda", "sees no CUDA device"), ("mps", "no Metal device"), ("tpu", "unknown; one of cuda, mps, cpu")],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, device: str, words: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        compute_init(device_type=device)
    assert compute_init()[-1].type == "cpu"


def test_a_seed_decides_every_generator() -> None:
    drawn = []
    for _ in range(2):
        seed_everything(7)
        drawn.append((random.random(), torch.rand(3).tolist()))
    assert drawn[0] == drawn[1]


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        ranks(monkeypatch, rank, 2)
        print0("rank", rank)
        print_banner()  # nothing: this is no terminal
    assert capsys.readouterr().out == "rank 0\n"
    DummyWandb().log({"loss": 1.0}, step=1)
    DummyWandb().finish()


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx2", "amx_bf16"}, torch.bfloat16),
        ({"avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"avx512f", "avx2"}, torch.float32),
        (set(), torch.float32),
    ],
)
def test_bfloat16_is_for_cpus_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(common, "cpu_flags", lambda: frozenset(flags))
    assert compute_dtype("cpu") == dtype
    assert compute_dtype("mps") == torch.float32
    monkeypatch.setenv("VIBECHAT_DTYPE", "bfloat16")
    assert compute_dtype("cpu") == torch.bfloat16
    monkeypatch.setenv("VIBECHAT_DTYPE", "float32")
    assert compute_dtype("cpu") == torch.float32
    monkeypatch.setenv("VIBECHAT_DTYPE", "half")
    with pytest.raises(UserError, match="VIBECHAT_DTYPE=half: must be bfloat16 or float32"):
        compute_dtype("cpu")


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_bfloat16_is_for_gpus_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype("cuda") == dtype


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_the_names_that_devices_have(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_no_name_in_the_table_hides_a_longer_one_after_it() -> None:
    for index, (name, peak) in enumerate(PEAK_BF16_FLOPS):
        assert not [later for later, its in PEAK_BF16_FLOPS[index + 1 :] if name in later and its != peak]


# ---------------------------------------------------------------------------------------------------------------------
# what torch.compile needs


def test_a_cpu_needs_a_compiler_and_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CXX", f"{compiler} -O2")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert compile_obstacle("cpu") is None
    (tmp_path / "Python.h").unlink()
    assert "Python's headers are missing" in str(compile_obstacle("cpu"))
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert "no C++ compiler was found" in str(compile_obstacle("cpu"))


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert "Triton is missing" in str(compile_obstacle("cuda"))
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: object())
    assert compile_obstacle("cuda") is None
    assert "untested on mps" in str(compile_obstacle("mps"))


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutMallopt:
        mallopt = None

    monkeypatch.setattr(common.ctypes, "CDLL", lambda name: WithoutMallopt)
    assert not keep_freed_memory()
    monkeypatch.setattr(common.sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_flags_of_this_cpu_are_words() -> None:
    assert all(flag and not flag.isspace() for flag in common.cpu_flags())
    assert bool(common.cpu_flags()) == Path("/proc/cpuinfo").exists()
