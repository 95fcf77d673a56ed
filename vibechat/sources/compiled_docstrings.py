"""A program of its own: print the docstrings of this Python's compiled modules as JSON, [[module, text], ...].

`python -I -S compiled_docstrings.py` is how `builtin` runs it: in a fresh interpreter a module is what Python made it,
whatever else the caller has imported or patched, and importing them all leaves no trace there. So it imports nothing
but the standard library.
"""

import importlib.machinery
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator

# Importing these does more than define things.
SKIPPED_COMPILED = re.compile(r"_tkinter|readline|_curses.*|_?xx.*|_test.*|_ctypes_test")


def compiled_docstrings() -> Iterator[tuple[str, str]]:
    """(module, text) of each compiled module: its own docstring, then those of what it defines, with signatures."""
    for name in sorted(sys.stdlib_module_names):
        if SKIPPED_COMPILED.fullmatch(name) or not is_compiled(name):
            continue
        try:
            module = importlib.import_module(name)
        except Exception:  # some distributions ship modules that cannot be imported
            continue
        parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
        for attribute, value in sorted(vars(module).items()):
            if not attribute.startswith("__") and (inspect.isbuiltin(value) or inspect.isclass(value)):
                parts.append(_described(attribute, value))
                if inspect.isclass(value):
                    members = sorted(vars(value).items())
                    parts += [_described(f"{attribute}.{key}", member) for key, member in members if key[:2] != "__"]
        text = "\n\n".join(part for part in parts if part)
        yield name, text


def is_compiled(name: str) -> bool:
    """Whether a top-level module is built in or an extension: one that has no source."""
    if name in sys.builtin_module_names:
        return True
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return bool(spec and spec.origin and spec.origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)))


def _described(name: str, value: object) -> str:
    doc = inspect.getdoc(value) if isinstance(getattr(value, "__doc__", None), str) else None
    if not doc or " object at 0x" in doc:
        return ""
    try:
        signature = str(inspect.signature(value)) if callable(value) else ""
    except (ValueError, TypeError):
        signature = ""
    if " at 0x" in signature:  # a default that prints its address would differ from run to run
        signature = ""
    return f"{name}{signature}\n{doc}"


if __name__ == "__main__":
    json.dump(list(compiled_docstrings()), sys.stdout)
