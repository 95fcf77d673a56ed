"""The built-in corpus: text that every Python carries, so that a machine with no network trains on something real.

Three kinds of documents: the topics of the language reference (`pydoc_data.topics`), the docstrings of modules that are
compiled (those of the others stand inside their sources), and the sources of the standard library without its tests and
tables, cut at top-level statements. No document is in twice.

Training and validation are split by module before anything is cut: modules in the order of a hash of their name go to
validation until it has VALIDATION_FRACTION of the bytes; a module as big as half of that always trains. `_datetime`,
`_pydatetime` and `datetime` count as one module. Text is copied between modules all the same, so a validation document
is dropped if more than MAX_SHARED of its bytes lie in 50-byte windows that training has too.
"""

import ast
import hashlib
import importlib
import json
import os
import platform
import re
import string
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vibechat.common import UserError
from vibechat.sources.shards import HashCache, ShardDirectory, ShardWriter, publish_directory

RECIPE = 1  # raise it when the corpus changes: what was built by an older one is built again
VALIDATION_FRACTION = 0.08
WINDOW = 50
MAX_SHARED = 0.05
DOCUMENT_CHARS = 6000  # sources are cut near this
MIN_CHARS = 200
# Tests repeat themselves (17 MB of them), and encodings are tables; topics are read by themselves.
SKIPPED_SOURCES = re.compile(
    r"(^|/)(test|tests|idle_test|site-packages|dist-packages|__pycache__)(/|$)|^(pydoc_data/|encodings/|_sysconfigdata)"
)
LETTERS = string.ascii_letters.encode() + b"_" + bytes(range(128, 256))

Windows = npt.NDArray[np.uint64]


def python_version() -> str:
    """What the corpus was made of."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def open_or_build(directory: Path, cache: HashCache, say: Callable[[str], None] = print) -> ShardDirectory:
    """The corpus, built on first use and again when Python or the recipe has changed. Raises UserError if damaged."""
    settings = {"python": python_version(), "recipe": RECIPE}
    known = ShardDirectory.load(directory)
    if known is not None and known.settings == settings:
        known.verify(cache)
        return known
    say(f"building the built-in corpus from {python_version()} in {directory}")
    train, val, counts = corpus()
    with publish_directory(directory) as temporary:
        shards = {}
        for split, texts in (("train", train), ("val", val)):
            writer = ShardWriter(temporary, prefix=f"{split}_")
            for text in texts:
                writer.add(text)
            shards[split] = writer.close()
        ShardDirectory(temporary, shards, dict(settings), dict(counts)).save()
    built = ShardDirectory.load(directory)
    assert built is not None
    for shard in built.shards["train"] + built.shards["val"]:
        cache.put(shard.path, shard.sha256)
    say(
        f"built-in corpus: {counts['train_documents']:,} documents, {counts['train_bytes'] / 1e6:.1f} MB to train on; "
        f"{counts['val_documents']:,} documents, {counts['val_bytes'] / 1e6:.2f} MB to validate on; dropped "
        f"{counts['val_dropped']:,} validation documents that share text with training"
    )
    return built


def corpus() -> tuple[list[str], list[str], dict[str, int]]:
    """Training documents, validation documents and counts: the same each time for the same Python."""
    modules: dict[str, list[str]] = {}  # module -> its whole texts, not cut yet
    for name, text in [*topics(), *compiled_docstrings(), *sources()]:
        modules.setdefault(module_key(name), []).append(text)
    if sum(len(text) for texts in modules.values() for text in texts) < 1_000_000:
        raise UserError(
            f"this Python has no sources of its standard library in {sysconfig.get_paths()['stdlib']}: "
            "give --data with text of your own"
        )
    chosen = validation_modules({name: sum(map(len, texts)) for name, texts in modules.items()})
    seen: set[str] = set()
    train, val = (
        in_hash_order(
            document
            for name in sorted(modules)
            if (name in chosen) == validates
            for text in modules[name]
            for document in cut(text)
            if not (document in seen or seen.add(document))  # type: ignore[func-returns-value]
        )
        for validates in (False, True)
    )
    shared = shared_fractions(val, train)
    kept = [text for text, fraction in zip(val, shared, strict=True) if fraction <= MAX_SHARED]
    counts = {
        "train_documents": len(train),
        "train_bytes": sum(len(text.encode()) for text in train),
        "val_documents": len(kept),
        "val_bytes": sum(len(text.encode()) for text in kept),
        "val_dropped": len(val) - len(kept),
    }
    return train, kept, counts


def in_hash_order(texts: Iterable[str]) -> list[str]:
    """Texts shuffled in a way that depends only on them."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


# ---------------------------------------------------------------------------------------------------------------------
# what this Python carries


def topics() -> Iterator[tuple[str, str]]:
    """(name, text) of each topic of the language reference."""
    try:
        pages = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        return
    for name, text in sorted(pages.items()):
        yield f"topic:{name}", text


def compiled_docstrings() -> list[tuple[str, str]]:
    """(module, text) of each compiled module, asked of a fresh interpreter: see `compiled_docstrings.py`."""
    script = Path(__file__).with_name("compiled_docstrings.py")
    # -I -S: what the user's environment and site-packages add to modules is not part of the corpus.
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(script)]
    try:
        done = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):  # the corpus is only smaller without
        return []
    return [(name, text) for name, text in json.loads(done.stdout) if len(text) >= MIN_CHARS]


def sources() -> Iterator[tuple[str, str]]:
    """(path within the library, text) of each source file of the standard library that is text and no table."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_python_files(root)):
        name = path.relative_to(root).as_posix()
        if SKIPPED_SOURCES.search(name):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):  # latin-1 fixtures
            continue
        if len(text) >= MIN_CHARS and not is_table(text):
            yield name, text


def _python_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not SKIPPED_SOURCES.search(name)]
        yield from (Path(directory, name) for name in files if name.endswith(".py"))


def is_table(text: str) -> bool:
    """Whether a file is mostly data: of its bytes other than spaces, under 60% are letters, _ or not ASCII."""
    solid = text.encode().translate(None, b" \t\r\n\f")
    letters = len(solid) - len(solid.translate(None, LETTERS))
    return letters < 0.6 * len(solid)


def module_key(name: str) -> str:
    """What is split as one: the top-level module, by whatever name its C or pure Python twin goes."""
    if name.startswith("topic:"):
        return name.lower()
    top = name.split("/")[0].removesuffix(".py").lower()
    return re.sub(r"^_*(py(?=datetime|decimal|io|long|abc|warnings))?", "", top)


def validation_modules(sizes: dict[str, int]) -> set[str]:
    """The modules that validate, chosen by the hash of their names."""
    wanted = VALIDATION_FRACTION * sum(sizes.values())
    chosen: set[str] = set()
    total = 0
    for name in in_hash_order(sizes):
        if total < wanted and sizes[name] <= wanted / 2:
            chosen.add(name)
            total += sizes[name]
    return chosen


def cut(text: str) -> Iterator[str]:
    """Documents of about DOCUMENT_CHARS: a source at its top-level statements, other text at its paragraphs."""
    if len(text) <= 1.5 * DOCUMENT_CHARS:
        if len(text.strip()) >= MIN_CHARS:
            yield text
        return
    lines = text.splitlines(keepends=True)
    starts = _places_to_cut(text, lines)
    begin, size = 0, 0
    for number, line in enumerate(lines):
        if size >= DOCUMENT_CHARS and number in starts:
            yield "".join(lines[begin:number])
            begin, size = number, 0
        size += len(line)
    rest = "".join(lines[begin:])
    if len(rest.strip()) >= MIN_CHARS:
        yield rest


def _places_to_cut(text: str, lines: list[str]) -> set[int]:
    """Line numbers, from 0, where a document may begin: top-level statements and methods, or else paragraphs."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return {number for number in range(1, len(lines)) if not lines[number - 1].strip() and lines[number].strip()}
    places = set()
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for statement in [node, *inside]:
            decorators = getattr(statement, "decorator_list", [])
            places.add(min([statement.lineno, *(decorator.lineno for decorator in decorators)]) - 1)
    return places


# ---------------------------------------------------------------------------------------------------------------------
# text that two splits share


def window_hashes(content: bytes) -> Windows:
    """A 64-bit polynomial hash of each window of WINDOW bytes, (max(len - WINDOW + 1, 0),), by doubling the window."""
    table = np.frombuffer(hashlib.shake_256(b"window").digest(256 * 8), np.uint64)
    power = 0x9E3779B97F4A7C15  # odd, so that no byte's weight vanishes modulo 2^64
    hashes = table[np.frombuffer(content, np.uint8)]  # windows of `length` bytes
    length, result, done = 1, None, 0
    rest = WINDOW
    while rest:
        if rest & 1:
            if result is None:
                result = hashes
            else:
                count = max(len(content) - (done + length) + 1, 0)
                weight = np.uint64(pow(power, done, 1 << 64))
                result = result[:count] + weight * hashes[done : done + count]
            done += length
        rest >>= 1
        if rest:
            count = max(len(content) - 2 * length + 1, 0)
            hashes = hashes[:count] + np.uint64(pow(power, length, 1 << 64)) * hashes[length : length + count]
            length *= 2
    assert result is not None
    return result[: max(len(content) - WINDOW + 1, 0)]


def shared_fractions(texts: list[str], others: Iterable[str]) -> list[float]:
    """For each text, the share of its bytes that lie in a window of WINDOW bytes that one of `others` has too."""
    contents = [text.encode() for text in texts]
    hashes = [window_hashes(content) for content in contents]
    if not hashes:
        return []
    known = np.unique(np.concatenate(hashes))
    found = np.zeros(len(known), bool)
    maybe = np.zeros(1 << 24, bool)  # by the upper bits: looking here first makes the search below rare
    maybe[known >> np.uint64(40)] = True
    for other in others:
        theirs = window_hashes(other.encode())
        theirs = theirs[maybe[theirs >> np.uint64(40)]]
        at = np.minimum(np.searchsorted(known, theirs), len(known) - 1)
        found[at[known[at] == theirs]] = True
    fractions = []
    for content, mine in zip(contents, hashes, strict=True):
        edges = np.zeros(len(content) + 1, np.int64)  # +1 where a shared window begins, -1 where it has ended
        starts = np.flatnonzero(found[np.searchsorted(known, mine)])
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + WINDOW, -1)
        fractions.append(float(np.count_nonzero(np.cumsum(edges)[:-1]) / max(len(content), 1)))
    return fractions
