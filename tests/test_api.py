"""The public interface is a promise: api.toml says what it is, this says that it is kept."""

import ast
import importlib
import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TABLE = tomllib.loads(Path(__file__).with_name("api.toml").read_text(encoding="utf-8"))
PROMISES = [(module, name, promise) for module, entries in TABLE.items() for name, promise in entries.items()]
ANY = "ANY"  # must exist and be callable; an inherited interface (torch's Optimizer.step) says the rest


def broken_promise(actual: Callable[..., Any], promise: str) -> str | None:
    """What of `promise` (a parameter list as in a def) `actual` does not keep; None if it keeps all of it."""
    expected = list(inspect.signature(eval(f"lambda {promise}: None")).parameters.values())
    found = list(inspect.signature(actual).parameters.values())
    if found and found[0].name == "self":
        del found[0]
    kinds = inspect.Parameter
    promised = {parameter.name for parameter in expected}
    extra = [parameter for parameter in found if parameter.name not in promised]
    for parameter in extra:
        if parameter.kind is not kinds.KEYWORD_ONLY or parameter.default is kinds.empty:
            return f"{parameter.name} must be keyword-only with a default"
    kept = [parameter for parameter in found if parameter.name in promised]
    if [p.name for p in kept] != [p.name for p in expected]:
        return f"parameters are {[p.name for p in kept]}"
    for have, want in zip(kept, expected, strict=True):
        if have.kind is not want.kind:
            return f"{want.name} is {have.kind.description}"
        if have.default != want.default or type(have.default) is not type(want.default):
            return f"{want.name} defaults to {have.default!r}"
    return None


@pytest.mark.parametrize(("module", "name", "promise"), PROMISES, ids=[f"{m}.{n}" for m, n, _ in PROMISES])
def test_promise(module: str, name: str, promise: str) -> None:
    actual: Any = importlib.import_module(f"vibechat.{module}")
    for part in name.split("."):
        actual = getattr(actual, part)
    assert callable(actual)
    if promise != ANY:
        assert broken_promise(actual, promise) is None


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, n, _ in PROMISES], ids=[f"{m}.{n}" for m, n, _ in PROMISES])
def test_what_is_promised_is_documented(module: str, name: str) -> None:
    """A docstring of its own or, for an overridden method, of the class that promises it first."""
    actual: Any = importlib.import_module(f"vibechat.{module}")
    for part in name.split("."):
        actual = getattr(actual, part)
    assert inspect.getdoc(actual), f"vibechat.{module}.{name} has no docstring"


@pytest.mark.parametrize("method", ["GPT.generate"])
def test_generators_yield(method: str) -> None:
    owner, name = method.split(".")
    function = getattr(getattr(importlib.import_module("vibechat.gpt"), owner), name)
    assert inspect.isgeneratorfunction(inspect.unwrap(function))


@pytest.mark.parametrize("module", TABLE)
def test_importing_does_no_work(module: str) -> None:
    """A module's body defines and assigns; it calls nothing for its effect, and runs no loop."""
    tree = ast.parse((Path(__file__).parents[1] / "vibechat" / f"{module}.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        assert not isinstance(statement, ast.For | ast.While | ast.With), f"{module}.py:{statement.lineno}"
        if isinstance(statement, ast.Expr):
            assert isinstance(statement.value, ast.Constant), f"{module}.py:{statement.lineno}"


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        (lambda a, b=1: None, None),
        (lambda a, b=1, *, c=2: None, None),
        (lambda a, b=1, c=2: None, "c must be keyword-only"),
        (lambda a, b=1, *, c: None, "c must be keyword-only with a default"),
        (lambda b=1, a=0: None, "parameters are ['b', 'a']"),
        (lambda a, b=2: None, "b defaults to 2"),
        (lambda a, b=1.0: None, "b defaults to 1.0"),
        (lambda a=0, b=1: None, "a defaults to 0"),
        (lambda a, *, b=1: None, "b is keyword-only"),
        (lambda a: None, "parameters are ['a']"),
    ],
)
def test_broken_promises_are_seen(actual: Callable[..., Any], words: str | None) -> None:
    complaint = broken_promise(actual, "a, b=1")
    assert complaint is None if words is None else words in (complaint or "")
