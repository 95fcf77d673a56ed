"""Train the tokenizer on a dataset.

Text is read once, as it comes, and not held; what is kept is how often each distinct chunk was seen. The result is
`<base directory>/tokenizer`, the same on any number of threads. A different tokenizer that stood there is kept beside
it under the name of its fingerprint, because models that were trained with it need it.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vibechat.common import UserError, get_base_dir
from vibechat.configurator import run_program
from vibechat.dataset import Dataset, open_dataset
from vibechat.report import get_report
from vibechat.tokenizer import (
    SPECIAL_TOKENS,
    Progress,
    RustBPETokenizer,
    default_vocab_size,
    get_tokenizer,
)

if TYPE_CHECKING:
    pass

SAMPLE_CHARS = 4_000_000  # of each split, to measure compression on


@dataclass(frozen=True)
class Config:
    """What `vibechat tok-train` takes."""

    # --- Text
    data: str = "builtin"
    """builtin, fineweb-edu, climbmix, or globs of parquet, jsonl and txt files"""
    text_column: str = "text"
    """the column or field that holds the text"""
    max_chars: int = 2_000_000_000
    """train on so many characters at most; -1 takes all"""
    # --- Tokenizer
    vocab_size: int = field(default_factory=default_vocab_size)
    """ids, the 9 special tokens included (65536 where there is a CUDA GPU, else 8192)"""
    num_threads: int = 0
    """threads that count chunks; 0 takes all cores"""

    def __post_init__(self) -> None:
        if self.max_chars < -1 or self.max_chars == 0:
            raise ValueError(f"--max-chars {self.max_chars}: must be positive, or -1 for all")
        if self.num_threads < 0:
            raise ValueError(f"--num-threads {self.num_threads}: must be positive, or 0 for all cores")


class Counted:
    """Texts, counted as they pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.documents += 1
            self.bytes += len(text) if text.isascii() else len(text.encode("utf-8", errors="replace"))
            yield text


@contextlib.contextmanager
def progress_display() -> Iterator[Progress | None]:
    """On a terminal, two bars for `train_from_iterator` to move; elsewhere None."""
    if not sys.stderr.isatty():
        yield None
        return
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, rich.progress.TaskID] = {}

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            words = (
                f"reading {done / 1e6:,.0f} MB" if stage == "reading" else f"merging to {done:,} of {total:,} tokens"
            )
            bars.update(tasks[stage], completed=done, description=words)

        yield move


def set_aside(directory: Path, fingerprint: str) -> Path | None:
    """Rename a directory that holds another tokenizer than the one with this fingerprint; where to, if it did."""
    try:
        old = get_tokenizer(directory=str(directory)).fingerprint()
    except UserError:
        return None  # none, or a damaged one
    aside = directory.with_name(f"{directory.name}-{old[:12]}")
    if old == fingerprint or aside.exists():
        return None
    directory.rename(aside)
    return aside


def compression(tokenizer: RustBPETokenizer, texts: Iterable[str]) -> float:
    """Bytes a token."""
    texts = list(texts)
    tokens = sum(map(len, tokenizer.encode(texts, num_threads=0)))
    return sum(len(text.encode("utf-8", errors="replace")) for text in texts) / max(tokens, 1)


def train(config: Config) -> None:
    """Train, say what came out, and save."""
    dataset = open_dataset(config.data, text_column=config.text_column)
    texts = Counted(dataset.iter_texts("train", None if config.max_chars == -1 else config.max_chars))
    start = time.perf_counter()
    with progress_display() as progress:
        tokenizer = RustBPETokenizer.train_from_iterator(
            texts, config.vocab_size, num_threads=config.num_threads, progress=progress
        )
    seconds = time.perf_counter() - start
    directory = Path(get_base_dir()) / "tokenizer"
    aside = set_aside(directory, tokenizer.fingerprint())
    tokenizer.save(str(directory))

    facts = describe(config, dataset, tokenizer, texts, seconds)
    for name, value in facts.items():
        print(f"{name:<12} {value}")
    if aside is not None:
        print(f"the tokenizer that was there, which models trained with it need, is now {aside}")
    get_report().log("Tokenizer training", [facts])


def describe(
    config: Config, dataset: Dataset, tokenizer: RustBPETokenizer, texts: Counted, seconds: float
) -> dict[str, str]:
    """What was done and what came out, for people."""
    threads = config.num_threads or os.cpu_count() or 1
    lengths = [len(token) for token in tokenizer.tokens]
    size = tokenizer.get_vocab_size()
    samples = {split: dataset.iter_texts(split, SAMPLE_CHARS) for split in ("train", "val")}
    ratios = ", ".join(f"{compression(tokenizer, sample):.3f} on {split}" for split, sample in samples.items())
    parts = f"256 bytes + {len(lengths) - 256:,} merges + {len(SPECIAL_TOKENS)} special"
    smaller = "" if size == config.vocab_size else f" (nothing is left to merge for {config.vocab_size:,})"
    return {
        "text": f"{dataset.name}: {texts.bytes / 1e6:,.1f} MB in {texts.documents:,} documents",
        "time": f"{seconds:.2f} s on {threads} threads, {texts.bytes / 1e6 / seconds:,.1f} MB/s",
        "vocabulary": f"{size:,} = {parts}{smaller}",
        "tokens": f"{sum(lengths) / len(lengths):.2f} bytes long on average, the longest {max(lengths)}",
        "compression": f"{ratios} (bytes a token)",
        "saved to": str(Path(get_base_dir()) / "tokenizer"),
        "fingerprint": tokenizer.fingerprint(),
    }


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train, return the exit status."""
    return run_program(train, Config, argv, prog="vibechat tok-train", description=(__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    raise SystemExit(main())
