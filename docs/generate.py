"""Write docs/reference/commands.md from the programs themselves: `make docs`. A test fails where it is out of date."""

import importlib
from pathlib import Path

from vibechat import cli
from vibechat.configurator import Flag, read_flags

PAGE = Path(__file__).parent / "reference" / "commands.md"
HEAD = """# Commands

<!-- Written by `make docs` from the programs; edit the docstrings there. -->

Each program runs as `vibechat VERB`, as `python scripts/VERB.py`, as `python -m scripts.VERB`, and behind
`torchrun ... scripts/VERB.py` or `torchrun ... -m scripts.VERB --`; the scripts run from a checkout that was not
installed, too. A flag is `--name=value` or `--name value`, with `-` or `_` in its name; a switch is `--name`,
`--no-name` or `--name=true|false`. `--help` lists the flags of a program, `--version` its version. A mistake costs one
line and exit status 2; Ctrl-C ends with 130.
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD]
    for name, purpose in cli.programs().items():
        verb = name.replace("_", "-")
        aliases = [alias for alias, program in cli.ALIASES.items() if program == name]
        also = f" Also `{'`, `'.join(alias.replace('_', '-') for alias in aliases)}`." if aliases else ""
        sections.append(f"## vibechat {verb}\n\n{purpose}.{also}\n")
        flags = read_flags(importlib.import_module(f"vibechat.programs.{name}").Config)
        for group in dict.fromkeys(flag.group for flag in flags.values()):
            rows = [_row(flag) for flag in flags.values() if flag.group == group]
            head = f"| {group or 'Flag'} | takes | default | |"
            sections.append("\n".join([head, "| --- | --- | --- | --- |", *rows]) + "\n")
    return "\n".join(sections)


def _row(flag: Flag) -> str:
    name = f"--[no-]{flag.spelling[2:]}" if flag.is_boolean else flag.spelling
    default = "" if flag.default_is_computed else flag.default_text  # this machine's is not every machine's
    cells = [f"`{name}`", _code(flag.metavar), _code(default), flag.help.replace("|", "\\|")]
    return "| " + " | ".join(cells) + " |"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
