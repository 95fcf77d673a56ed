"""Checkpoints: what is loaded is what was saved, a kill or a full disk loses nothing, and damage is always noticed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibechat import checkpoint_manager as cm
from vibechat.common import UserError

CPU = torch.device("cpu")


def model_at(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "transformer.wte.weight": torch.randn(7, 4, generator=generator),
        "lm_head.weight": torch.randn(7, 4, generator=generator).to(torch.bfloat16),
    }


def optimizer_at(step: int) -> cm.OptimizerData:
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        "transformer.wte.weight": {
            "exp_avg": torch.randn(7, 4, generator=generator),
            "step": torch.tensor(float(step)),
        },
        "lm_head.weight": {"momentum": torch.randn(4, 7, generator=generator).t()},  # not contiguous
    }


def save(directory: Path, step: int, keep: int = -1) -> Path:
    return cm.save_checkpoint(
        str(directory), step, model_at(step), optimizer_at(step), {"step": step}, loader_data={"row": step}, keep=keep
    )


def read_all(directory: Path, step: int) -> None:
    cm.load_checkpoint(str(directory), step, CPU, load_optimizer=True)
    cm.load_documents(directory, step)


def assert_is_step(directory: Path, step: int) -> None:
    model, optimizer, meta = cm.load_checkpoint(str(directory), step, CPU, load_optimizer=True)
    assert optimizer is not None
    assert meta == {"step": step}
    assert cm.load_documents(directory, step) == ({"step": step}, {"row": step})
    assert model.keys() == model_at(step).keys()
    for name, tensor in model_at(step).items():
        assert model[name].dtype == tensor.dtype
        assert torch.equal(model[name], tensor)
    assert optimizer.keys() == optimizer_at(step).keys()
    for name, states in optimizer_at(step).items():
        assert optimizer[name].keys() == states.keys()
        assert all(torch.equal(optimizer[name][key], value) for key, value in states.items())


# ---------------------------------------------------------------------------------------------------------------------
# round trip and layout


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path / "base_checkpoints" / "d4", 123)
    assert path.name == "step_000123"
    assert sorted(p.name for p in path.iterdir()) == [
        "loader.json",
        "manifest.json",
        "meta.json",
        "model.safetensors",
        "optimizer_00000.safetensors",
    ]
    assert_is_step(path.parent, 123)


def test_without_optimizer(tmp_path: Path) -> None:
    cm.save_checkpoint(str(tmp_path), 5, model_at(5), None, {"a": [1, None, "é"]})
    model, optimizer, meta = cm.load_checkpoint(str(tmp_path), 5, CPU, load_optimizer=True)
    assert optimizer is None
    assert meta == {"a": [1, None, "é"]}
    assert torch.equal(model["lm_head.weight"], model_at(5)["lm_head.weight"])
    save(tmp_path, 6)
    assert cm.load_checkpoint(str(tmp_path), 6, CPU)[1] is None  # not asked for


def test_views_of_one_buffer_are_saved_separately(tmp_path: Path) -> None:
    """An optimizer may keep the states of equal shapes in one stacked tensor."""
    stacked = torch.arange(24.0).view(2, 3, 4)
    cm.save_checkpoint(str(tmp_path), 1, {}, {"a": {"momentum": stacked[0]}, "b": {"momentum": stacked[1]}}, {})
    _, optimizer, _ = cm.load_checkpoint(str(tmp_path), 1, CPU, load_optimizer=True)
    assert optimizer is not None
    assert torch.equal(optimizer["b"]["momentum"], stacked[1])


def test_optimizer_shards_of_several_ranks_are_read_as_one(tmp_path: Path) -> None:
    """The keys are parameter names, so whoever reads needs not know how many ranks wrote."""
    path = save(tmp_path, 1)
    shard = path / "optimizer_00000.safetensors"
    tensors = cm.load_file(shard)
    cm.save_file({k: v for k, v in tensors.items() if k.startswith("lm_head")}, shard)
    cm.save_file(
        {k: v for k, v in tensors.items() if not k.startswith("lm_head")}, path / "optimizer_00001.safetensors"
    )
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("optimizer_00000.safetensors", "optimizer_00001.safetensors"):
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": cm._sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    assert_is_step(tmp_path, 1)


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    for path in save(tmp_path, 1).iterdir():
        head = path.read_bytes()[:16]
        assert not head.startswith((b"\x80", b"PK"))  # pickle protocols 2 and later, and torch.save's zip
        assert b"{" in head


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(UserError, match="never overwritten"):
        cm.save_checkpoint(str(tmp_path), 3, {"w": torch.zeros(1)}, None, {})
    assert_is_step(tmp_path, 3)


@pytest.mark.parametrize("tag", ["../x", "", ".hidden", "a/b", "a b", "-x"])
def test_a_tag_is_one_plain_name(tag: str) -> None:
    with pytest.raises(UserError, match="model tag"):
        cm.checkpoints_dir("base", tag)


def test_checkpoints_dir(base_dir: Path) -> None:
    assert cm.checkpoints_dir("sft", "d20") == base_dir / "sft_checkpoints" / "d20"
    assert cm.checkpoints_dir("rl") == base_dir / "rl_checkpoints"
    with pytest.raises(UserError, match="base, mid, sft, rl"):
        cm.checkpoints_dir("pre")


# ---------------------------------------------------------------------------------------------------------------------
# find and prune


def test_find_last_step(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no checkpoint in"):
            cm.find_last_step(str(directory))
    for step in (5, 1_000_000, 40):
        save(tmp_path, step)
    (tmp_path / "step_backup").mkdir()
    (tmp_path / ".tmp-step_2000000-ab").mkdir()
    assert cm.list_steps(tmp_path) == [5, 40, 1_000_000]
    assert cm.find_last_step(str(tmp_path)) == 1_000_000
    with pytest.raises(UserError, match="the steps there: 5, 40, 1000000"):
        cm.load_checkpoint(str(tmp_path), 6, CPU)


def test_find_largest_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model in"):
        cm.find_largest_model(str(tmp_path / "missing"))
    for tag, size in (("d4", 10), ("wide", 1000), ("d26-tiny", 100)):
        cm.save_checkpoint(str(tmp_path / tag), 1, {"w": torch.zeros(size)}, None, {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").touch()
    assert cm.find_largest_model(str(tmp_path)) == "wide"


@pytest.mark.parametrize(("keep", "left"), [(-1, [1, 2, 3, 4]), (3, [2, 3, 4]), (1, [4]), (0, [4]), (9, [1, 2, 3, 4])])
def test_prune(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=keep)
    assert cm.list_steps(tmp_path) == left
    assert {p.name for p in tmp_path.iterdir()} == {".lock"} | {f"step_{s:06d}" for s in left}


def test_prune_keeps_the_newest_whole_step(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_bit(tmp_path / "step_000003" / "model.safetensors", 200)
    cm.prune_checkpoints(tmp_path, 1)
    assert cm.list_steps(tmp_path) == [2, 3]
    assert_is_step(tmp_path, 2)


def test_set_aside_hides_a_step_and_keeps_its_files(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    aside = cm.set_aside(tmp_path, 2)
    assert cm.list_steps(tmp_path) == [1]
    assert (aside / "model.safetensors").exists()
    save(tmp_path, 2, keep=1)
    assert cm.list_steps(tmp_path) == [2]
    assert (aside / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# damage


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


FILES = ["model.safetensors", "optimizer_00000.safetensors", "meta.json", "loader.json", "manifest.json"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), bit=st.integers(0, 100_000), truncate=st.booleans())
def test_any_flipped_bit_and_any_truncation_is_found(tmp_path: Path, name: str, bit: int, truncate: bool) -> None:
    directory = tmp_path / "tag"
    if not directory.exists():
        save(directory, 7)
    path = directory / "step_000007" / name
    good = path.read_bytes()
    if truncate:
        path.write_bytes(good[: bit % len(good)])
    else:
        flip_bit(path, bit)
    try:
        with pytest.raises(cm.CorruptCheckpointError, match="is corrupt"):
            read_all(directory, 7)
    finally:
        path.write_bytes(good)
    assert_is_step(directory, 7)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (save(tmp_path, 7) / name).unlink()
    with pytest.raises(cm.CorruptCheckpointError, match=f"{name} is missing"):
        cm.verify_checkpoint(tmp_path, 7)


def test_the_one_before_a_damaged_one_is_used(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_bit(tmp_path / "step_000003" / "optimizer_00000.safetensors", 4000)
    (tmp_path / "step_000002" / "meta.json").write_text("{")
    lines: list[str] = []
    assert cm.last_whole_step(tmp_path, lines.append) == 1
    assert len(lines) == 2
    assert "step_000003 is corrupt: optimizer_00000.safetensors" in lines[0]
    assert "step_000002 is corrupt: meta.json has 1 bytes" in lines[1]
    assert cm.last_whole_step(tmp_path / "missing") is None


# ---------------------------------------------------------------------------------------------------------------------
# kills


def die_at(call: int, action: Callable[[], object]) -> bool:
    """Run `action` in a fork that kills itself before its `call`-th change of the file system; True if it lived."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        def half_saved(tensors: dict[str, torch.Tensor], path: Path) -> None:
            real_save_file(tensors, path)
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
            written(None)
            path.write_bytes(data)

        real_save_file = cm.save_file
        written = counted(lambda _: None)
        cm.save_file = half_saved
        os.fsync = counted(os.fsync)  # type: ignore[assignment]
        for name in ("rename", "mkdir", "write_text"):
            setattr(Path, name, counted(getattr(Path, name)))
        os.unlink = counted(os.unlink)  # type: ignore[assignment]
        os.rmdir = counted(os.rmdir)  # type: ignore[assignment]
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_instant_of_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    kills = 0
    for call in range(1, 200):
        directory = tmp_path / str(call)
        for step in (1, 2):
            save(directory, step)
        lived = die_at(call, lambda directory=directory: save(directory, 3, keep=2))
        steps = cm.list_steps(directory)
        assert steps in ([1, 2], [1, 2, 3], [2, 3])
        for step in steps:
            assert_is_step(directory, step)
        save(directory, 4, keep=3)  # the dead process's lock does not block, and what it left is removed
        assert cm.list_steps(directory) == [*steps, 4][-3:]
        assert {p.name[:5] for p in directory.iterdir()} == {".lock", "step_"}
        if lived:
            break
        kills += 1
    assert lived
    assert kills > 20


def run_python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_live_run_keeps_its_tag_and_a_dead_one_does_not(tmp_path: Path) -> None:
    directory = tmp_path / "d4"
    code = f"""
from filelock import FileLock
from pathlib import Path
Path({str(directory)!r}).mkdir()
with FileLock({str(directory / ".lock")!r}):
    (Path({str(directory)!r}) / ".tmp-step_000001-live").mkdir()
    print("held", flush=True)
    input()
"""
    with run_python(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"locked by a live run.*--resume auto"):
            save(directory, 1)
        assert (directory / ".tmp-step_000001-live").exists()  # a live run's temporary is left alone
        process.kill()
        process.wait()
    save(directory, 1)
    assert not (directory / ".tmp-step_000001-live").exists()
    assert_is_step(directory, 1)


def test_the_lock_may_be_entered_again_by_its_holder(tmp_path: Path) -> None:
    with cm.lock_tag(tmp_path / "d4"):
        save(tmp_path / "d4", 1)
        assert_is_step(tmp_path / "d4", 1)
    with cm.lock_tag(tmp_path / "d4"):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# full disks


def test_too_little_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="free some space") as caught:
        save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("call", range(1, 7))  # five files and their directory
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    save(tmp_path, 1)
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"disk is full; the last good checkpoint is .*step_000001"):
            save(tmp_path, 2, keep=1)
        assert {p.name for p in tmp_path.iterdir()} == {".lock", "step_000001"}
    assert_is_step(tmp_path, 1)
    save(tmp_path, 2, keep=1)
    assert_is_step(tmp_path, 2)


def test_a_real_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: usage._replace(free=1 << 40)
        )  # somebody else filled it since
        save(small, 1)
        with pytest.raises(UserError, match=r"disk is full; the last good checkpoint is .*step_000001"):
            cm.save_checkpoint(str(small), 2, {"w": torch.randn(200_000)}, None, {})
        assert cm.list_steps(small) == [1]
        assert_is_step(small, 1)
        save(small, 2)  # what the failed save had written is gone
        assert_is_step(small, 2)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot create"):
        save(tmp_path / "file" / "d4", 1)
