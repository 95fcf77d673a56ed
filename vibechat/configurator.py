"""A dataclass becomes a command line.

A program describes what it takes as a dataclass whose fields all have defaults:

    @dataclass(frozen=True)
    class Config:
        # --- Model
        depth: int = 4
        \"""layers; every other size follows from it\"""
        # --- Run
        compile: bool = True
        \"""compile the model with torch.compile\"""
        device_batch_size: int | Literal["auto"] = "auto"
        \"""rows in a micro-batch\"""

    def main(argv: list[str] | None = None) -> int:
        return run_program(train, Config, argv, prog="vibechat train", description="Train a base model.")

The line of text under a field is its help, a comment `# --- Title` starts a group of flags. What a person may type:
`--depth=8` or `--depth 8`; `-` or `_` in names; `--compile`, `--no-compile`, `--compile=false` (true, yes, on, 1 and
their opposites, in any case); a leading `--`, which torchrun leaves behind, is skipped; of a flag given twice the last
one counts. A mistake costs one line on stderr and exit status 2.

The reading of argv is ours, because it must be this lenient and its errors this short; the conversion of each value to
its field's type (int, float, str, Path, Literal, unions of them) is tyro's.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import vibechat

if TYPE_CHECKING:
    from rich.text import Text

ConfigT = TypeVar("ConfigT")

GROUP_COMMENT = re.compile(r"#\s*-{3,}\s*(\S.*?)[\s-]*$")
BOOLEAN_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
TYPE_NAMES = {  # the placeholder in the help, and what an error says that the value must be
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "text"),
    Path: ("PATH", "a path"),
}
WIDEST_METAVAR = 20  # characters; longer lists of choices move into the help text
WIDEST_HELP = 100  # characters; longer lines tire the eye


class UsageError(Exception):
    """What a person typed cannot be understood: one line that says what, where and what to do."""


def parse(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
) -> ConfigT:
    """Turn a command line into an instance of `config_class`.

    Args:
        config_class: a dataclass, every field of which has a default.
        argv: what follows the program's name; None takes it from sys.argv.
        prog: how the program is called, as in "vibechat train".
        description: what `--help` says first.

    Raises:
        SystemExit: status 0 after `--help` (`-h`) or `--version`; status 2 after one line on stderr for a mistake.
            A `__post_init__` that raises ValueError makes such a line too; its UserError passes through.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    flags = read_flags(config_class)
    try:
        given = _split(flags, tokens)
        if "help" in given:
            print_help(flags, prog=prog, description=description)
            sys.exit(0)
        if "version" in given:
            print(f"vibechat {vibechat.__version__}", flush=True)
            sys.exit(0)
        values = {name: _convert(flags[name], text) for name, text in given.items()}
        try:
            return config_class(**values)
        except ValueError as error:  # a __post_init__ that checks fields against each other
            raise UsageError(str(error)) from error
    except UsageError as error:
        _fail(f"{error} ({prog} --help)")


def run_program(
    body: Callable[[ConfigT], int | None],
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
) -> int:
    """Parse the command line, run `body(config)` and return the exit status.

    None from the body means 0. A UserError, wherever it was raised, becomes `error: ...` on stderr and 2; Ctrl-C
    becomes 130; a reader that went away (`| head`) ends the program quietly with 141, as it ends other programs.
    Any other exception is a bug and keeps its traceback.
    """
    try:
        status = body(parse(config_class, argv, prog=prog, description=description))
        sys.stdout.flush()  # so that a reader that went away is noticed here and not at exit
        return status or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What Python would still flush at exit goes nowhere, without a second complaint.
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from vibechat.common import UserError  # late: it loads torch, and `--help` must not wait for that

        if not isinstance(error, UserError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# what a dataclass says about its flags


@dataclasses.dataclass(frozen=True)
class Flag:
    """One field of a configuration, as the command line sees it."""

    name: str
    """as in Python: device_batch_size"""
    type: Any
    """its annotation, resolved"""
    default: Any
    """what it is when nobody says anything"""
    help: str
    """the line under it in the source; empty if there is none"""
    group: str
    """the heading it stands under; empty before the first"""
    default_is_computed: bool = False
    """whether the default comes from a factory, and may be another one on another machine"""

    @property
    def spelling(self) -> str:
        """As a person types it: --device-batch-size."""
        return "--" + self.name.replace("_", "-")

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The members of a union, or the type alone; None left out."""
        members = typing.get_args(self.type) if _is_union(self.type) else (self.type,)
        return tuple(member for member in members if member is not type(None))

    @property
    def may_be_none(self) -> bool:
        """Whether the word none stands for None (never where it could be text)."""
        return type(None) in typing.get_args(self.type) and str not in self.alternatives

    @property
    def is_boolean(self) -> bool:
        """Whether it may stand without a value."""
        return bool in self.alternatives

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that its Literals allow."""
        return tuple(str(c) for a in self.alternatives if typing.get_origin(a) is Literal for c in typing.get_args(a))

    @property
    def metavar(self) -> str:
        """What stands for the value in the help: INT, {a,b}, INT|auto."""
        names = [TYPE_NAMES.get(a, ("VALUE", ""))[0] for a in self.alternatives if _is_plain(a)]
        if not names and len(self.choices) > 1:
            return "{" + ",".join(self.choices) + "}"
        return "|".join([*names, *self.choices])

    @property
    def default_text(self) -> str:
        """The default as a person would say it; empty where there is nothing to say."""
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return "" if self.default is None else str(self.default)

    @property
    def expectation(self) -> str:
        """What a value must be, in words."""
        words = [TYPE_NAMES.get(a, ("", getattr(a, "__name__", str(a))))[1] for a in self.alternatives if _is_plain(a)]
        words += ["true", "false"] * self.is_boolean + list(self.choices) + ["none"] * self.may_be_none
        return " or ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + " or " + words[-1]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_plain(annotation: Any) -> bool:
    return annotation is not bool and typing.get_origin(annotation) is not Literal


def read_flags(config_class: type) -> dict[str, Flag]:
    """Every init field of a dataclass by name, in order, with its help and group from the source (if it is there)."""
    if not dataclasses.is_dataclass(config_class):
        raise TypeError(f"{config_class!r} is not a dataclass")
    hints = typing.get_type_hints(config_class)
    notes: dict[str, tuple[str, str]] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            notes.update(_read_notes(base))
    flags = {}
    for field in dataclasses.fields(config_class):
        if not field.init:
            continue
        computed = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if default is dataclasses.MISSING:
            raise TypeError(f"{config_class.__name__}.{field.name} has no default: a flag is never obligatory")
        help_text, group = notes.get(field.name, ("", ""))
        flags[field.name] = Flag(field.name, hints[field.name], default, help_text, group, computed)
    return flags


def _read_notes(config_class: type) -> dict[str, tuple[str, str]]:
    """{field: (help, group)} from the source of one dataclass."""
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):  # typed into a console
        return {}
    lines = source.splitlines()
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    notes: dict[str, tuple[str, str]] = {}
    group, seen_lines = "", 0
    for statement, following in zip(body, [*body[1:], None], strict=True):
        for line in lines[seen_lines : statement.lineno]:
            if heading := GROUP_COMMENT.fullmatch(line.strip()):
                group = heading[1]
        seen_lines = statement.end_lineno or statement.lineno
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            notes[statement.target.id] = (text, group)
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# what a person typed


def _split(flags: dict[str, Flag], tokens: Sequence[str]) -> dict[str, str]:
    """argv -> {field name: text of its value}; help and version appear under their own names, with any text."""
    given: dict[str, str] = {}
    rest = list(tokens)
    if rest and rest[0] == "--":
        rest.pop(0)
    last = ""
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help", "--version"):
            return {"version" if token == "--version" else "help": ""}
        if not token.startswith("--"):
            raise UsageError(_unexpected(flags, token, last))
        spelled, equals, text = token.partition("=")
        name = spelled[2:].replace("-", "_")
        if name not in flags:
            positive = flags.get(name.removeprefix("no_"))
            if not name.startswith("no_") or positive is None or not positive.is_boolean:
                raise UsageError(f"{spelled}: unknown flag{_suggestion(flags, name)}")
            if equals:
                raise UsageError(f"{token}: --no-... takes no value; say {positive.spelling}={text}")
            given[positive.name] = "false"
        elif equals:
            given[name] = text
        elif flags[name].is_boolean:
            given[name] = rest.pop(0) if rest and _is_value_of_boolean(flags[name], rest[0]) else "true"
        elif rest and not _is_flag(flags, rest[0]):
            given[name] = rest.pop(0)
            token += " " + given[name]
        else:
            raise UsageError(f"{spelled}: a value is missing: {flags[name].expectation}")
        last = token
    return given


def _is_value_of_boolean(flag: Flag, token: str) -> bool:
    return token.lower() in BOOLEAN_WORDS or token in flag.choices


def _is_flag(flags: dict[str, Flag], token: str) -> bool:
    """Whether a token is one of our flags, rather than a value that starts with a dash, such as -1."""
    name = token.partition("=")[0][2:].replace("-", "_")
    return token.startswith("--") and (name in flags or name in ("help", "version") or name.startswith("no_"))


def _unexpected(flags: dict[str, Flag], token: str, last: str) -> str:
    name = token.partition("=")[0].lstrip("-").replace("-", "_")
    if name in flags:
        return f"{token}: flags start with two dashes: {flags[name].spelling}"
    if last and not token.startswith("-"):
        return f"{token!r} after {last}: every flag takes one value; put a pattern or a value with spaces into quotes"
    return f"{token!r}: not a flag{_suggestion(flags, name)}"


def _suggestion(flags: dict[str, Flag], name: str) -> str:
    names = [*flags, *(f"no_{flag.name}" for flag in flags.values() if flag.is_boolean), "help", "version"]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean --{close[0].replace('_', '-')}?" if close else ""


def _convert(flag: Flag, text: str) -> Any:
    """The text of a value -> the value, by tyro; raises UsageError."""
    if flag.is_boolean and text.lower() in BOOLEAN_WORDS:
        return BOOLEAN_WORDS[text.lower()]
    if flag.may_be_none and text.lower() == "none":
        return None
    import tyro  # late: a tenth of a second that `--help` need not pay

    holder = dataclasses.make_dataclass("Holder", [("value", flag.type)])
    arguments, markers = [f"--value={text}"], (tyro.conf.FlagConversionOff,)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # console_outputs=False still draws some of its errors
            return tyro.cli(holder, args=arguments, console_outputs=False, config=markers).value
    except SystemExit as error:
        close = difflib.get_close_matches(text, flag.choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{flag.spelling}: {text!r} is not {flag.expectation}{hint}") from error


# ---------------------------------------------------------------------------------------------------------------------
# --help


def print_help(flags: dict[str, Flag], *, prog: str, description: str) -> None:
    """Print the flags by group, each with what it takes, what it is for and its default, as wide as the terminal."""
    from rich.console import Console
    from rich.text import Text

    groups: dict[str, list[tuple[Text, str]]] = {}
    for flag in flags.values():
        groups.setdefault(flag.group or "Flags", []).append((_help_left(flag), _help_right(flag)))
    common = groups.setdefault("Flags" if list(groups) == ["Flags"] else "Help", [])
    common += [(Text("--help", "cyan"), "print this"), (Text("--version", "cyan"), "print the version")]

    console = Console(highlight=False)
    width = min(console.width, WIDEST_HELP)
    indent = max(left.cell_len for rows in groups.values() for left, _ in rows) + 4
    page = Text.assemble(("usage: ", "dim"), (prog, "bold"), " [--flag value ...]\n")
    if description:
        page.append("\n" + inspect.cleandoc(description) + "\n")
    for title, rows in groups.items():
        page.append("\n").append(title + "\n", "bold")
        for left, right in rows:
            page.append("  ").append_text(left).append(" " * (indent - 2 - left.cell_len))
            for number, line in enumerate(textwrap.wrap(right, max(width - indent, 24)) or [""]):
                text, opening, default = line.partition("(default:")
                page.append(" " * indent if number else "").append(text).append(opening + default + "\n", "dim")
    with console.capture() as captured:
        console.print(page, end="", soft_wrap=True)
    lines = captured.get().replace("\N{NO-BREAK SPACE}", " ").splitlines()
    print("\n".join(line.rstrip() for line in lines), flush=True)


def _help_left(flag: Flag) -> "Text":
    from rich.text import Text

    name = "--[no-]" + flag.spelling[2:] if flag.is_boolean else flag.spelling
    metavar = flag.metavar if len(flag.metavar) <= WIDEST_METAVAR else "NAME"
    return Text.assemble((name, "cyan"), (f" {metavar}" if metavar else "", "dim"))


def _help_right(flag: Flag) -> str:
    text = flag.help
    if len(flag.metavar) > WIDEST_METAVAR:
        text += ("; " if text else "") + "one of " + ", ".join(flag.choices)
    return f"{text} (default:\N{NO-BREAK SPACE}{flag.default_text})".lstrip() if flag.default_text else text
