"""The console command: `vibechat VERB --flag value ...`, a verb for each program in vibechat/programs.

The list of verbs is the list of files there, and what each is for is the first line of its docstring, read without
importing it: `vibechat --help` answers before torch could be loaded.
"""

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import vibechat

# The order in which a person meets them; programs not named here follow alphabetically.
ORDER = ("doctor", "prepare", "tok_train", "tok_eval", "train", "base_loss", "report")
ALIASES = {"base_train": "train", "chat_web": "serve"}


def programs() -> dict[str, str]:
    """{module name: what it is for}, in the order of a person's work."""
    found = {}
    for path in sorted(Path(__file__).with_name("programs").glob("[a-z]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = docstring.partition("\n")[0].rstrip(".")
    return {
        name: found[name] for name in sorted(found, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that the first word names with the words after it; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:  # vibechat help train
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        _print_verbs()
        return 0
    if words[0] == "--version":
        print(f"vibechat {vibechat.__version__}")
        return 0
    known = programs()
    name = words[0].replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in known:
        print(f"error: {_complaint(words[0], [*known, *_aliases(known)])} (vibechat --help)", file=sys.stderr)
        return 2
    return importlib.import_module(f"vibechat.programs.{name}").main(words[1:])


def _aliases(known: dict[str, str]) -> list[str]:
    return [alias for alias, name in ALIASES.items() if name in known]


def _complaint(word: str, names: list[str]) -> str:
    """One line about a first word that is no verb."""
    if word.startswith("-"):
        return f"{word}: the verb comes first, as in `vibechat train {word}`"
    close = difflib.get_close_matches(word.replace("-", "_"), names, n=1, cutoff=0.5)
    return f"{' '.join(word.split())!r} is not a verb" + (f"; did you mean {_spell(close[0])}?" if close else "")


def _spell(name: str) -> str:
    return name.replace("_", "-")


def _print_verbs() -> None:
    known = programs()
    print(f"vibechat {vibechat.__version__}: a ChatGPT-like language model from nothing, at measured speed\n")
    print("usage: vibechat VERB [--flag value ...]\n")
    width = max(map(len, known))
    for name, purpose in known.items():
        print(f"  {_spell(name):<{width}}  {purpose}")
    aliases = ", ".join(f"{_spell(alias)} is {_spell(ALIASES[alias])}" for alias in _aliases(known))
    print(f"\n{aliases + '. ' if aliases else ''}`vibechat VERB --help` lists the flags of a verb.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
