"""The rules of the house: who may import whom, what an import may cost, and that everything public says what it is."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "vibechat").rglob("*.py"))
}
# From the ground up; a module imports only modules that stand before it. Modules not named here must only keep the
# graph free of cycles.
ORDER = [
    *("common", "configurator", "report", "kernels", "attention", "fp8", "muon", "adamw", "gpt", "scaling"),
    *("tokenizer", "dataset", "dataloader", "checkpoint_manager", "engine", "loss_eval", "trainer", "programs", "cli"),
]
# Libraries that not every machine has, and the only modules that may import them.
CONFINED = {
    "tyro": ("vibechat.configurator",),
    "triton": ("vibechat.kernels", "vibechat.programs.doctor"),
    "wandb": ("vibechat.run_directory",),
}
# These import what only Unix has, and only where they are on it.
LATE_UNIX = ("vibechat.trainer",)


def imports_of(path: Path, *, for_types: bool = True) -> Iterator[tuple[str, int]]:
    """(module, line) of each import in a file, `from a import b` as a and as a.b; those for types alone if wanted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = set() if for_types else {id(node) for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: say the whole name of the module"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            yield node.module or "", node.lineno


def house_imports(module: str) -> set[str]:
    """The modules of vibechat that a module imports when it runs, early or late."""
    imported = {name for name, _ in imports_of(FILES[module], for_types=False)}
    return {name for name in imported if name in FILES and name not in (module, "vibechat")}


@pytest.mark.parametrize("module", FILES)
def test_the_house_stands_alone(module: str) -> None:
    for name, line in imports_of(FILES[module]):
        assert name.split(".")[0] not in ("scripts", "bench", "tests"), f"{FILES[module]}:{line} imports {name}"


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_modules_below_it(module: str) -> None:
    def place(name: str) -> int | None:
        part = name.split(".")[1] if "." in name else name
        return ORDER.index(part) if part in ORDER else None

    own = place(module)
    for name in house_imports(module):
        other = place(name)
        if own is not None and other is not None:
            assert other <= own, f"{module} imports {name}, which stands above it"


def test_no_module_imports_itself_in_a_circle() -> None:
    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in house_imports(module):
                if not (module.startswith(name + ".") or name.startswith(module + ".")):  # a package and its parts
                    visit(name, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in FILES:
        visit(module, ())


@pytest.mark.parametrize("library", CONFINED)
def test_libraries_that_not_every_machine_has_are_confined(library: str) -> None:
    for module, path in FILES.items():
        for name, line in imports_of(path):
            if name.split(".")[0] == library:
                assert module.startswith(CONFINED[library]), f"{path}:{line} imports {library}"


def test_kernels_know_nothing_but_torch_and_triton() -> None:
    for module, path in FILES.items():
        if module.startswith("vibechat.kernels"):
            for name, line in imports_of(path):
                root = name.split(".")[0]
                own = name.startswith("vibechat.kernels") or name == "vibechat"
                assert own or root in ("torch", "triton") or root in sys.stdlib_module_names, f"{path}:{line}: {name}"


def test_importing_any_module_needs_neither_command_lines_nor_triton_nor_the_extension() -> None:
    """As on macOS, or where nothing was compiled; programs but for their `main` are part of it."""
    blocked = ["tyro", "triton", "wandb", "vibechat._rustbpe", "matplotlib", "transformers"]
    # torch itself asks for triton while it is imported, so it comes first
    code = f"""
import sys, importlib, torch
for name in {blocked!r}: sys.modules[name] = None
for name in {sorted(FILES)!r}: importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_triton_is_asked_for_on_linux_alone() -> None:
    """macOS and Windows install without it, and without modules that only Unix has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [line for line in project["dependencies"] if line.startswith("triton")]
    assert requirement.endswith("sys_platform == 'linux'")
    for module, path in FILES.items():
        unix = {"fcntl", "grp", "pty", "pwd", "resource", "termios"} & {name for name, _ in imports_of(path)}
        assert not unix or module in LATE_UNIX, f"{module} imports {unix}"


def test_the_core_needs_torch_alone() -> None:
    """A machine with a GPU, torch and Triton, and nothing else, can train a step and measure it."""
    blocked = ["tyro", "rich", "pyarrow", "huggingface_hub", "matplotlib", "tiktoken", "tokenizers", "safetensors"]
    blocked += ["filelock", "wandb", "vibechat._rustbpe"]
    measurement = "--worker eager --depth 1 --max-seq-len 16 --vocab-size 300 --micro-batch 2 --device cpu"
    measurement += " --total-batch-size 32 --warmup 1"
    code = f"""
import sys, importlib
for name in {blocked!r}: sys.modules[name] = None
names = ["attention", "engine", "kernels", "loss_eval", "memory_plan", "micro_batch", "scaling", "train_step"]
for name in [*names, "trainer"]:
    importlib.import_module("vibechat." + name)
from bench import mfu
raise SystemExit(mfu.main({measurement.split()!r}))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, input="2\nwaterfall\n")
    assert done.returncode == 0, done.stderr
    assert "seconds" in done.stdout


@pytest.mark.parametrize("module", FILES)
def test_everything_public_says_what_it_is(module: str) -> None:
    """Modules, functions, classes; methods too, unless a base class may have said it or they are shorter than that."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    public = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
    for owner in [n for n in public if isinstance(n, ast.ClassDef) and not n.bases]:
        methods = [n for n in owner.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
        public += [method for method in methods if len(ast.unparse(method).splitlines()) > 3]
    for node in public:
        assert ast.get_docstring(node), f"{FILES[module]}:{node.lineno}: {node.name} has no docstring"


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_a_chapter(module: str) -> None:
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 500
