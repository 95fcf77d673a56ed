"""The documents are true: links lead somewhere, flags exist, the tutorial runs as it is written."""

import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vibechat import cli
from vibechat.configurator import read_flags
from vibechat.scaling import plan

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "LOG.md", *(ROOT / "docs").rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
TUTORIAL = ROOT / "docs/tutorials/01-first-model.md"

COMMON_FLAGS = {"help", "version"}
# of other programs that the documents mention: torchrun, pytest, and ours that use argparse
OTHER_FLAGS = {"standalone", "nproc_per_node", "nproc-per-node", "benchmark-only"}
for path in (ROOT / "vibechat/dataset.py", *(ROOT / "bench").rglob("*.py")):
    OTHER_FLAGS |= set(re.findall(r'add_argument\([^)]*?"--([a-z-]+)"', path.read_text(encoding="utf-8")))
# `vibechat VERB`, `python scripts/VERB.py`, `python -m scripts.VERB` and what follows on the line
CALL = re.compile(r"(?:\bvibechat |python scripts/|-m scripts\.)([a-z_-]+)(?:\.py)?((?: [^`|\n]*)?)")
MENTION = re.compile(r"(?<![\w-])--([a-z][\w-]*)")


def flags_of(program: str) -> set[str]:
    config = importlib.import_module(f"vibechat.programs.{program}").Config
    flags = read_flags(config).values()
    names = {flag.name for flag in flags} | {f"no_{flag.name}" for flag in flags if flag.is_boolean}
    return {name.replace("_", "-") for name in names} | COMMON_FLAGS


def code_of(page: Path) -> list[str]:
    """The pieces of code on a page: lines of fenced blocks, continued lines joined, and inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline


def anchors_of(page: Path) -> set[str]:
    """The anchors that a reader of Markdown makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors_of(aim), f"{target}: no such heading"


def test_every_document_is_reachable_from_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name == "README.md" or f"({page.relative_to(ROOT / 'docs')})" in index
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist_with_their_flags(page: Path) -> None:
    known = cli.programs()
    for code in code_of(page):
        for verb, rest in CALL.findall(code):
            name = verb.replace("-", "_")
            if name in ("", "help") or verb.startswith("-") or code.startswith(("from ", "import ", "pip ")):
                continue
            program = cli.ALIASES.get(name, name)
            assert program in known, f"`{code}`: there is no verb {verb}"
            for flag in MENTION.findall(rest):
                assert flag.replace("_", "-") in flags_of(program), f"`{code}`: {verb} has no --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_that_are_mentioned_exist(page: Path) -> None:
    every = set().union(*(flags_of(program) for program in cli.programs())) | OTHER_FLAGS
    for code in code_of(page):
        for flag in MENTION.findall(re.sub(r"^\$ (make|git|uv|pip|cargo|apt).*", "", code)):
            if flag not in ("name", "no-name"):  # what the page of commands calls any flag
                assert flag in every or flag.replace("_", "-") in every, f"`{code}`: no program has --{flag}"


def test_make_targets_that_are_mentioned_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for code in code_of(page):
            if match := re.match(r"(?:\$ )?make ([a-z]+)", code):
                assert match[1] in targets, f"{page.name}: make {match[1]}"


def test_the_page_of_commands_is_what_the_programs_say() -> None:
    generator = runpy.run_path(str(ROOT / "docs/generate.py"))
    assert (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8") == generator["page"](), "run: make docs"


def test_the_variables_are_those_of_the_source() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "vibechat").rglob("*.py"))
    documented = (ROOT / "docs/reference/environment.md").read_text()
    assert set(re.findall(r"VIBECHAT_[A-Z_]+", sources)) == set(re.findall(r"VIBECHAT_[A-Z_]+", documented))


# ---------------------------------------------------------------------------------------------------------------------
# the tutorial


def commands_of(page: Path) -> list[str]:
    """What a reader types: the lines of the blocks that are marked as bash."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_tutorial_has_commands() -> None:
    commands = commands_of(TUTORIAL)
    assert len(commands) >= 5
    assert all(shlex.split(command)[0] == "vibechat" for command in commands)


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(base_dir: Path, tmp_path: Path) -> None:
    """Every command as it stands, one after the other, in one shell's environment; then what it promised is there."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VIBECHAT_BASE_DIR": str(base_dir),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }
    pages = {}
    for command in commands_of(TUTORIAL):
        words = [sys.executable, "-m", "vibechat.cli", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
        pages[command] = done.stdout
    run = base_dir / "runs/toy"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 40
    assert 6.5 < losses[0] < 7.4, "the tutorial says: near ln 1024"
    assert losses[-1] < losses[0] - 1
    assert (run / "report.md").exists()
    assert (run / "loss.png").exists()
    documented = (ROOT / "docs/reference/files.md").read_text()
    for key in set().union(*rows):
        assert f"`{key}`" in documented, f"{key} is in metrics.jsonl and not in docs/reference/files.md"
    train, again = (page for command, page in pages.items() if command.startswith("vibechat train"))
    assert all(name in train for name in ("zlib", "bzip2", "xz")), "the tutorial says that they are compared"
    assert "this model is below the best of the three" in train, "the tutorial says: it is already below them"
    measured = re.findall(r"this model +\d+\.\d+", train)
    assert measured
    assert measured == re.findall(r"this model +\d+\.\d+", again), "the tutorial says: the same bits per byte again"


def test_the_numbers_of_the_one_dial_are_those_of_the_plan() -> None:
    small = plan(4, sequence_len=512, vocab_size=8192, total_batch_size=4096, num_iterations=1000)
    page = (ROOT / "docs/explanation/the-one-dial.md").read_text(encoding="utf-8")
    for (name, four, _), (_, twenty, formula) in zip(small.rows()[1:], plan(20).rows()[1:], strict=True):
        assert f"| {name} | {formula} | {four} | {twenty} |" in page
