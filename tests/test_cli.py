"""The console command and the scripts: every program by every name, and mistakes in one line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vibechat
from vibechat import cli

ROOT = Path(__file__).parents[1]


def call(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_programs_are_the_files() -> None:
    names = {path.stem for path in (ROOT / "vibechat/programs").glob("*.py")} - {"__init__"}
    assert set(cli.programs()) == names
    assert {"doctor", "report"} <= names


@pytest.mark.parametrize("name", cli.programs())
def test_each_program_says_in_one_line_what_it_is_for(name: str) -> None:
    purpose = cli.programs()[name]
    assert 10 < len(purpose) < 80, purpose


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_alone_it_lists_the_verbs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    page = capsys.readouterr().out
    for name, purpose in cli.programs().items():
        assert purpose in page
        assert name.replace("_", "-") in page


def test_the_list_is_in_the_order_of_a_persons_work() -> None:
    known = [name for name in cli.programs() if name in cli.ORDER]
    assert known == [name for name in cli.ORDER if name in known]


@pytest.mark.parametrize("verb", [[], *([name] for name in cli.programs())])
def test_version(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*verb, "--version"]) == 0
    assert capsys.readouterr().out == f"vibechat {vibechat.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["reprot"], ["'reprot' is not a verb", "did you mean report?"]),
        (["docter", "--json"], ["did you mean doctor?"]),
        (["qqqqqq"], ["'qqqqqq' is not a verb ("]),
        (["--depth", "4"], ["--depth: the verb comes first"]),
        (["a\nb"], ["'a b' is not a verb"]),
        ([""], ["'' is not a verb"]),
        (["../secrets"], ["is not a verb"]),
        (["__init__"], ["is not a verb"]),
    ],
)
def test_a_wrong_verb_costs_one_line(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err


def test_words_after_the_verb_go_to_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["report", "--help"], ["help", "report"]):
        assert cli.main(argv) == 0
        assert "usage: vibechat report" in capsys.readouterr().out
    assert cli.main(["report", "--run=nowhere"]) == 2
    assert "no run has left metrics" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_a_program() -> None:
    """Answering at once is a matter of what is imported, which a test can see on any machine."""
    done = call("-c", "import sys; from vibechat.cli import main; main([]); print(*sys.modules, file=sys.stderr)")
    loaded = done.stderr.split()
    assert "vibechat.cli" in loaded
    assert not {"torch", "tyro", "rich", "numpy"} & set(loaded)
    assert not [name for name in loaded if name.startswith("vibechat.programs.")]


# ---------------------------------------------------------------------------------------------------------------------
# scripts/

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")


def test_there_is_a_script_for_every_program_and_alias() -> None:
    known = cli.programs()
    assert set(SCRIPTS) == {*known, *(alias for alias, name in cli.ALIASES.items() if name in known)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_only_calls_the_program_of_its_name(name: str) -> None:
    source = (ROOT / "scripts" / f"{name}.py").read_text()
    program = cli.ALIASES.get(name, name)
    assert f"from vibechat.programs.{program} import main" in source
    assert len(ast.parse(source).body) == 6  # what it is, where the checkout is, the import, the call


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "vibechat.cli", "doctor"),
        ("-m", "scripts.doctor"),
        ("scripts/doctor.py",),
        ("-m", "vibechat.programs.doctor"),
    ],
)
def test_every_way_to_start_a_program(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as after installation
    done = call(*words, "--", "--version") if "vibechat.cli" not in words else call(*words, "--version")
    assert (done.returncode, done.stdout) == (0, f"vibechat {vibechat.__version__}\n"), done.stderr


def test_a_script_of_a_checkout_needs_no_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From any directory, and never with the package of another checkout."""
    (tmp_path / "vibechat").mkdir()
    (tmp_path / "vibechat/__init__.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = call(str(ROOT / "scripts/train.py"), "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"vibechat {vibechat.__version__}\n"), done.stderr


@pytest.mark.parametrize("words", [("-m", "scripts.doctor", "--"), ("scripts/doctor.py",)])
def test_under_torchrun(words: tuple[str, ...]) -> None:
    """torchrun hands its own `--` on to the program; the second form is that of a checkout."""
    done = call("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", *words, "--version")
    assert done.returncode == 0, done.stderr
    assert f"vibechat {vibechat.__version__}" in done.stdout
