"""The front door: what it lists, and what it says on a machine that lacks something."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

EVERYTHING = "#!/bin/sh\nexit 0\n"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of what the Makefile looks at, and a PATH in bin/ that holds a shell's tools and nothing else."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "rustbpe/src").mkdir(parents=True)
    (tmp_path / "rustbpe/Cargo.toml").touch()
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "bash", "awk", "grep", "rm", "find", "touch", "mkdir"):
        path = shutil.which(tool)
        assert path is not None
        (tmp_path / "bin" / tool).symlink_to(path)
    return tmp_path


def install(house: Path, name: str, script: str = EVERYTHING) -> None:
    (house / "bin" / name).write_text(script)
    (house / "bin" / name).chmod(0o755)


def make(house: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    assert MAKE is not None
    environment = {"PATH": str(house / "bin"), "HOME": str(house)}
    return subprocess.run([MAKE, *targets], cwd=house, env=environment, capture_output=True, text=True, timeout=60)


def test_help_lists_every_target_in_a_screen(house: Path) -> None:
    page = make(house).stdout
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert targets is not None
    for target in targets[1].split():
        assert re.search(rf"^  make {target} +\S", page, re.MULTILINE), target
        assert re.search(rf"^{target}:.* ## ", MAKEFILE, re.MULTILINE), target
    assert len(page.splitlines()) < 20
    assert max(map(len, page.splitlines())) <= 100
    assert make(house, "help").stdout == page


def test_without_rust_one_line_says_what_to_do(house: Path) -> None:
    install(house, "uv")
    done = make(house, "setup")
    assert done.returncode == 2
    assert done.stdout == ""
    error, makes_own = done.stderr.splitlines()
    assert error.startswith("error: Rust is missing (cargo not found): install it from rustup.rs")
    assert makes_own.startswith("make: ***")


def test_rust_where_rustup_puts_it_is_found(house: Path) -> None:
    install(house, "uv", '#!/bin/sh\n[ "$1" != sync ] || mkdir .venv\n')
    (house / ".cargo/bin").mkdir(parents=True)
    (house / "bin/sh").rename(house / ".cargo/sh")
    (house / "bin/sh").symlink_to(house / ".cargo/sh")
    (house / ".cargo/bin/cargo").write_text(EVERYTHING)
    (house / ".cargo/bin/cargo").chmod(0o755)
    assert make(house, "setup").returncode == 0
    assert (house / ".venv/.ready").exists()


def test_a_missing_uv_is_fetched_by_pip(house: Path) -> None:
    """pip is asked for uv, into .uv/, and that uv then installs everything."""
    uv = '#!/bin/sh\necho "uv $@"\n[ "$1" != sync ] || mkdir .venv\n'
    (house / "uv.sh").write_text(uv)
    pip = '#!/bin/sh\necho "python3 $@"\nmkdir -p .uv/bin\n(while read -r l; do echo "$l"; done) <uv.sh >.uv/bin/uv\n'
    install(house, "python3", pip + "chmod +x .uv/bin/uv\n")
    chmod = shutil.which("chmod")
    assert chmod is not None
    (house / "bin/chmod").symlink_to(chmod)
    install(house, "cargo")
    done = make(house, "setup")
    assert done.returncode == 0, done.stderr
    assert re.search(r"python3 -m pip install .*--target \.uv uv\n", done.stdout)
    assert "uv sync" in done.stdout


def test_a_shim_that_does_not_run_is_no_uv(house: Path) -> None:
    install(house, "uv", "#!/bin/sh\nexit 127\n")
    install(house, "python3", "#!/bin/sh\nexit 1\n")
    done = make(house, "setup")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: pip could not fetch uv: install uv yourself")


def test_an_installed_house_is_not_installed_again(house: Path) -> None:
    install(house, "uv", '#!/bin/sh\necho "uv $@"\n[ "$1" != sync ] || mkdir -p .venv\n')
    install(house, "cargo")
    assert "uv sync" in make(house, "setup").stdout
    assert "uv sync" not in make(house, "setup").stdout
    (house / "rustbpe/src/lib.rs").write_text("// changed")
    assert "uv sync" in make(house, "setup").stdout


def test_targets_call_what_they_promise(house: Path) -> None:
    install(house, "uv")
    install(house, "cargo")
    expected = {
        ("demo",): "python scripts/train.py --demo",
        ("train", "DEPTH=8", "ARGS=--num-iterations 3"): "python scripts/train.py --depth 8 --num-iterations 3",
        ("test",): "pytest",
        ("check",): "ruff check",
        ("bench",): "python -m bench.mfu",
        ("doctor",): "vibechat doctor",
    }
    for words, command in expected.items():
        assert f"run --no-sync {command}" in make(house, "-n", *words).stdout


def test_clean_removes_what_was_built_and_nothing_else(house: Path) -> None:
    for path in (
        ".venv/x",
        ".uv/x",
        ".pytest_cache/x",
        "rustbpe/target/x",
        "vibechat/__pycache__/x",
        "vibechat/gpt.py",
    ):
        (house / path).parent.mkdir(parents=True, exist_ok=True)
        (house / path).touch()
    (house / "vibechat/_rustbpe.abi3.so").touch()
    assert make(house, "clean").returncode == 0
    left = {str(path.relative_to(house)) for path in house.rglob("*") if path.is_file()} - {
        "Makefile",
        "pyproject.toml",
    }
    assert {path for path in left if not path.startswith("bin/")} == {"vibechat/gpt.py", "rustbpe/Cargo.toml"}
