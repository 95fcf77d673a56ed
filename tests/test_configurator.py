"""The command line: every way to type a flag, every kind of value, every mistake in one line."""

import dataclasses
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vibechat
from vibechat.common import UserError
from vibechat.configurator import BOOLEAN_WORDS, parse, read_flags, run_program


@dataclass(frozen=True)
class Config:
    """A run, as the tests need it."""

    note: str = ""
    # --- Model
    depth: int = 4
    """layers; every other size follows from it"""
    compile: bool = True
    """compile the model
    with torch.compile"""
    profile: bool = False
    # an ordinary comment is no heading
    device_batch_size: int | Literal["auto"] = "auto"
    """rows in a micro-batch"""
    # --- Data ---
    data: str = "builtin"
    """builtin, or a glob"""
    ratio: float = 20.0
    seed: int | None = None
    target_flops: Optional[float] = None  # noqa: UP045 - the old spelling must work too
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """which kernels"""
    level: Literal[1, 2] = 1
    output: Path = Path("out")
    source: Literal["fineweb-edu-100b", "climbmix-400b", "builtin-corpus"] = "builtin-corpus"
    """where from"""


def read(*argv: str) -> Config:
    return parse(Config, list(argv), prog="vibechat test")


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake costs; fails unless it is one line on stderr, nothing on stdout, and status 2."""
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


# ---------------------------------------------------------------------------------------------------------------------
# what may be typed


def test_nothing_typed_gives_the_defaults() -> None:
    assert read() == Config()
    assert read("--") == Config()


def test_defaults_are_returned_as_they_are_and_factories_are_called() -> None:
    @dataclass
    class Other:
        tags: Any = dataclasses.field(default_factory=lambda: ["a"])
        ratio: float = 20

    first, second = (parse(Other, [], prog="x") for _ in range(2))
    assert first.tags == ["a"]
    assert first.tags is not second.tags
    assert [flag.default_is_computed for flag in read_flags(Other).values()] == [True, False]


@pytest.mark.parametrize(
    "argv",
    [
        ["--device-batch-size=8"],
        ["--device_batch_size=8"],
        ["--device-batch_size=8"],
        ["--device-batch-size", "8"],
        ["--device_batch_size", "8"],
        ["--", "--device_batch_size=8"],
        ["--device-batch-size=2", "--device-batch-size=8"],
    ],
)
def test_every_spelling_of_a_flag(argv: list[str]) -> None:
    assert read(*argv) == Config(device_batch_size=8)


@pytest.mark.parametrize("spelling", ["--depth=-1", "--depth -1"])
def test_a_negative_number_is_a_value_and_not_a_flag(spelling: str) -> None:
    assert read(*spelling.split()).depth == -1


def test_values_of_each_type() -> None:
    line = "--ratio 1e-3 --seed 7 --target-flops=1e18 --kernels triton --level 2 --output a/b --data my/*.txt"
    config = read(*line.split())
    assert config == Config(
        ratio=1e-3, seed=7, target_flops=1e18, kernels="triton", level=2, output=Path("a/b"), data="my/*.txt"
    )
    assert isinstance(config.level, int)
    assert isinstance(config.output, Path)


def test_union_of_a_number_and_a_word() -> None:
    assert read("--device-batch-size=auto").device_batch_size == "auto"
    assert read("--device-batch-size=16").device_batch_size == 16


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_is_a_word_where_no_text_may_stand(word: str) -> None:
    assert parse(Config, [f"--seed={word}", f"--target-flops={word}"], prog="x") == Config()
    assert read(f"--data={word}").data == word


@pytest.mark.parametrize("field", ["compile", "profile"])
def test_every_way_to_say_yes_and_no(field: str) -> None:
    for argv, expected in [([f"--{field}"], True), ([f"--no-{field}"], False), ([f"--no_{field}"], False)]:
        assert getattr(read(*argv), field) is expected
    for word, expected in BOOLEAN_WORDS.items():
        for variant in (word, word.upper(), word.capitalize()):
            assert getattr(read(f"--{field}={variant}"), field) is expected
            assert getattr(read(f"--{field}", variant, "--depth=9"), field) is expected


def test_a_boolean_takes_the_next_word_only_if_it_is_one() -> None:
    assert read("--profile", "--depth", "3") == Config(profile=True, depth=3)
    assert read("--compile", "--no-compile") == Config(compile=False)


def test_optional_booleans_and_booleans_with_a_word() -> None:
    @dataclass
    class Other:
        graphs: bool | None = None
        compile: bool | Literal["auto"] = "auto"

    assert parse(Other, [], prog="x") == Other()
    assert parse(Other, ["--graphs", "--compile", "auto"], prog="x") == Other(True, "auto")
    assert parse(Other, ["--no-graphs", "--compile"], prog="x") == Other(False, True)
    assert parse(Other, ["--graphs=none", "--compile=False"], prog="x") == Other(None, False)


def test_a_field_that_is_called_no_something_wins_over_a_negation() -> None:
    @dataclass
    class Other:
        no_cache: bool = False
        cache: bool = True

    assert parse(Other, ["--no-cache"], prog="x") == Other(no_cache=True, cache=True)


text_values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(value=text_values)
def test_text_arrives_unchanged_after_an_equals_sign(value: str) -> None:
    assert read(f"--data={value}").data == value


@given(value=text_values.filter(lambda text: not text.startswith("-")))
def test_text_arrives_unchanged_as_the_next_word(value: str) -> None:
    assert read("--data", value).data == value


@given(value=st.integers(), separate=st.booleans())
def test_whole_numbers_arrive_unchanged(value: int, separate: bool) -> None:
    assert read(*(["--depth", str(value)] if separate else [f"--depth={value}"])).depth == value


@given(value=st.floats(allow_nan=False))
def test_numbers_arrive_unchanged(value: float) -> None:
    assert read(f"--ratio={value!r}").ratio == value


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "depth": st.integers(-100, 100),
            "compile": st.booleans(),
            "profile": st.booleans(),
            "device_batch_size": st.integers(1, 64) | st.just("auto"),
            "data": st.text("abc*/. -=_", max_size=8),
            "kernels": st.sampled_from(["auto", "triton", "torch"]),
            "seed": st.none() | st.integers(0, 9),
        },
    ),
    st.randoms(use_true_random=False),
)
def test_a_configuration_survives_being_typed(values: dict[str, Any], random: Any) -> None:
    """Any subset of flags, in any order, in any of their spellings, gives the dataclass that it spells."""
    tokens: list[list[str]] = []
    for name, value in values.items():
        spelled = "--" + "".join(random.choice("-_") if c == "_" else c for c in name)
        if isinstance(value, bool):
            negated = "--no-" + spelled[2:]
            tokens.append(random.choice([[spelled if value else negated], [f"{spelled}={value}"]]))
        elif random.random() < 0.5 or str(value).startswith("--"):
            tokens.append([f"{spelled}={value}"])
        else:
            tokens.append([spelled, str(value)])
    random.shuffle(tokens)
    assert read(*(token for group in tokens for token in group)) == Config(**values)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--depht 3", ["--depht", "unknown flag", "did you mean --depth?", "vibechat test --help"]),
        ("--device-batchsize=3", ["did you mean --device-batch-size?"]),
        ("--no-profil", ["did you mean --no-profile?"]),
        ("--hepl", ["did you mean --help?"]),
        ("--zzzzzz", ["--zzzzzz: unknown flag ("]),
        ("--depth x", ["--depth", "'x'", "a whole number"]),
        ("--depth 1.5", ["'1.5'", "a whole number"]),
        ("--depth=", ["''", "a whole number"]),
        ("--ratio twenty", ["'twenty' is not a number"]),
        ("--seed soon", ["'soon' is not a whole number or none"]),
        ("--device-batch-size huge", ["'huge' is not a whole number or auto"]),
        ("--kernels tritn", ["'tritn' is not auto, triton or torch", "did you mean triton?"]),
        ("--level 3", ["'3' is not 1 or 2"]),
        ("--compile=perhaps", ["'perhaps' is not true or false"]),
        ("--no-compile=true", ["takes no value", "--compile=true"]),
        ("--no-depth", ["--no-depth: unknown flag"]),
        ("--depth", ["--depth: a value is missing: a whole number"]),
        ("--depth --compile", ["--depth: a value is missing"]),
        ("--data --help", ["--data: a value is missing"]),
        ("-depth 3", ["two dashes: --depth"]),
        ("depth 3", ["two dashes: --depth"]),
        ("train", ["'train': not a flag"]),
        ("--data a.txt b.txt", ["'b.txt' after --data a.txt", "quotes"]),
        ("--depth 3 -- --compile", ["--: unknown flag"]),
    ],
)
def test_a_mistake_costs_one_line(capsys: pytest.CaptureFixture[str], argv: str, words: list[str]) -> None:
    line = mistake(capsys, *argv.split())
    for word in words:
        assert word in line


def test_a_value_with_line_breaks_still_costs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'a\\nb'" in mistake(capsys, "--depth=a\nb")
    mistake(capsys, "a\nb")
    mistake(capsys, "--a\nb")
    mistake(capsys, "--no-compile=a\nb")


@given(st.lists(st.text("-=_ adeghlnoprtu013\n", max_size=14), max_size=4))
def test_nothing_that_is_typed_makes_a_traceback(tokens: list[str]) -> None:
    assert run(lambda config: 0, *tokens) in (0, 2)


def test_a_check_across_fields_is_a_mistake_too(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Other:
        low: int = 0
        high: int = 1

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("--low is above --high")

    with pytest.raises(SystemExit) as stop:
        parse(Other, ["--low=2"], prog="x")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --low is above --high (x --help)\n"


def test_a_field_without_default_is_refused_when_written_not_when_typed() -> None:
    @dataclass
    class Other:
        depth: int

    with pytest.raises(TypeError, match="no default"):
        parse(Other, ["--depth=3"], prog="x")
    with pytest.raises(TypeError, match="not a dataclass"):
        read_flags(int)


# ---------------------------------------------------------------------------------------------------------------------
# help and version


def help_page(capsys: pytest.CaptureFixture[str], config_class: type = Config) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(config_class, ["--help"], prog="vibechat test", description="Test a thing.\n\n    At length.")
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_names_every_flag_with_its_text_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    page = help_page(capsys)
    assert page.startswith("usage: vibechat test")
    for flag in read_flags(Config).values():
        assert flag.spelling in page or "--[no-]" + flag.spelling[2:] in page
        assert all(word in page for word in flag.help.split())
    assert "(default: builtin)" in page
    assert "(default: on)" in page
    assert "(default: 20)" in page
    assert "(default: off)" in page
    assert "(default: None)" not in page
    assert all(line == line.rstrip() for line in page.splitlines())
    assert "\x1b" not in page  # no colours into a pipe
    if columns != "40":
        assert max(map(len, page.splitlines())) <= min(int(columns), 100)


def test_help_groups_flags_under_their_comments(capsys: pytest.CaptureFixture[str]) -> None:
    page = help_page(capsys)
    headings = [line for line in page.splitlines() if line and not line.startswith(" ") and ":" not in line]
    assert headings == ["Test a thing.", "At length.", "Flags", "Model", "Data", "Help"]
    assert page.index("--note") < page.index("\nModel") < page.index("--depth") < page.index("\nData")


def test_notes_of_the_source() -> None:
    flags = read_flags(Config)
    assert flags["compile"].help == "compile the model with torch.compile"
    assert flags["profile"].help == ""
    assert [flags[name].group for name in ("note", "depth", "profile", "data", "kernels")] == [
        "",
        "Model",
        "Model",
        "Data",
        "Data",
    ]


def test_a_subclass_adds_to_the_notes_of_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class More(Config):
        # --- More
        depth: int = 12
        """another default"""
        extra: bool = False
        """one more"""

    flags = read_flags(More)
    assert flags["depth"].help == "another default"
    assert flags["data"].help == "builtin, or a glob"
    assert flags["extra"].group == "More"
    assert "(default: 12)" in help_page(capsys, More)


def test_a_class_without_source_still_parses(capsys: pytest.CaptureFixture[str]) -> None:
    made = dataclasses.make_dataclass("Made", [("depth", int, 3)])
    assert parse(made, ["--depth=5"], prog="x") == made(depth=5)
    assert "--depth INT" in help_page(capsys, made)


def test_help_and_version_win_over_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["-h"], ["--depth=3", "--help", "--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            read(*argv)
        assert stop.value.code == 0
        assert "usage: vibechat test" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        read("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"vibechat {vibechat.__version__}\n"


# ---------------------------------------------------------------------------------------------------------------------
# run_program


def run(body: Any, *argv: str) -> int:
    return run_program(body, Config, list(argv), prog="vibechat test", description="Test.")


def test_the_body_gets_the_configuration_and_gives_the_status() -> None:
    seen: list[Config] = []
    assert run(seen.append, "--depth=3") == 0
    assert seen == [Config(depth=3)]
    assert run(lambda config: config.depth, "--depth=5") == 5
    assert run(lambda config: 0) == 0


def test_mistakes_help_and_version_do_not_reach_the_body(capsys: pytest.CaptureFixture[str]) -> None:
    def body(config: Config) -> None:
        raise AssertionError("reached")

    assert run(body, "--depht=3") == 2
    assert run(body, "--help") == 0
    assert run(body, "--version") == 0
    assert capsys.readouterr().err.count("\n") == 1


def test_a_user_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def body(config: Config) -> None:
        raise UserError("shard 3 of data/ is corrupt:\n  delete it and run again")

    assert run(body) == 2
    assert capsys.readouterr().err == "error: shard 3 of data/ is corrupt: delete it and run again\n"


def test_an_interrupt_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def body(config: Config) -> None:
        raise KeyboardInterrupt

    assert run(body) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback() -> None:
    def body(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(body)


def test_an_exit_inside_the_body_is_a_status() -> None:
    assert [run(lambda config, code=code: sys.exit(code)) for code in (None, 0, 3, "words")] == [0, 0, 3, 1]


PROGRAM = textwrap.dedent('''
    import sys
    from dataclasses import dataclass
    from vibechat.configurator import run_program

    @dataclass
    class Config:
        lines: int = 1
        """how many"""

    def body(config):
        for number in range(config.lines):
            print(number)

    sys.exit(run_program(body, Config, prog="count", description="Count."))
''')


def test_a_reader_that_goes_away_makes_no_noise(tmp_path: Path) -> None:
    program = tmp_path / "count.py"
    program.write_text(PROGRAM)
    for flags in (["--lines=1000000"], ["--lines=1"]):
        process = subprocess.Popen(
            [sys.executable, str(program), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""},
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
        process.stderr.close()
        assert process.wait(timeout=60) == 141
        assert complaint == b""


def test_parsing_loads_no_torch(tmp_path: Path) -> None:
    """`--help` answers at once: neither the configurator nor a parsed flag imports torch."""
    program = tmp_path / "count.py"
    program.write_text(PROGRAM.replace("sys.exit(", "status = (") + "assert 'torch' not in sys.modules\n")
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""}
    for flags in (["--help"], ["--lines=2"], ["--lines=x"]):
        done = subprocess.run([sys.executable, str(program), *flags], env=environment, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
