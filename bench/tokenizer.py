"""The tokenizer against its baselines, in one run: `python -m bench.tokenizer`.

Training against the `rustbpe` package and Hugging Face's `tokenizers`, encoding against tiktoken's batch encoding and
`rustbpe`'s, all with the same text, pattern, vocabulary and threads, taking turns round by round. A ratio is the median
over rounds of (baseline's seconds / our seconds in the same round); above 1 we are faster. Each round encodes with a
new encoder, so that nothing is remembered from the round before.

The text is by default what every Python carries: the sources of its library and of the packages installed beside it,
each distinct file once. `--data 'more/*.parquet'` (parquet with a text column, jsonl, or anything else as a text) adds
other text in front of it. `--json` ends the output with one line of JSON; `--check` exits 1 if a bar is missed.
"""

import argparse
import glob
import hashlib
import itertools
import json
import os
import platform
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.measure import commit_of
from vibechat.common import cpu_name

BARS = {
    ("train", "rustbpe"): 1.5,
    ("train", "tokenizers"): 3.0,
    ("encode", "tiktoken"): 1.0,
}
LOADER_BATCH = 128  # documents that the data loader encodes at a time


# ---------------------------------------------------------------------------------------------------------------------
# text


def documents_of(path: str, text_column: str) -> Iterator[str]:
    """The documents of a file: a row or a line of parquet and jsonl each, else the whole file."""
    if path.endswith(".parquet"):
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=[text_column]):
            yield from batch.column(0).to_pylist()
    elif path.endswith(".jsonl"):
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield row[text_column] if isinstance(row, dict) and text_column in row else line
    else:
        yield Path(path).read_text(encoding="utf-8", errors="replace")


def python_sources() -> Iterator[str]:
    """Every source file of the running Python and of what is installed beside it, in the order of their names."""
    directories = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    files = {path for directory in directories for path in Path(directory).rglob("*.py")}
    for path in sorted(files):
        try:
            yield path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # a broken link
            continue


def distinct(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Each text once, until there are about `max_bytes`."""
    seen: set[bytes] = set()
    kept: list[str] = []
    total = 0
    for text in texts:
        data = text.encode("utf-8", errors="replace")
        digest = hashlib.sha256(data).digest()
        if data and digest not in seen:
            seen.add(digest)
            kept.append(data.decode("utf-8"))
            total += len(data)
            if total >= max_bytes:
                break
    return kept


def load_corpus(patterns: list[str], text_column: str, max_bytes: int) -> list[str]:
    """The text to work on, in a shuffled but fixed order, so that every batch is a mixture."""
    files = [path for pattern in patterns for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207, patterns may be absolute
    if patterns and not files:
        sys.exit(f"error: --data {' '.join(patterns)}: no such file")
    given = itertools.chain.from_iterable(documents_of(path, text_column) for path in files)
    corpus = distinct(itertools.chain(given, python_sources()), max_bytes)
    random.Random(0).shuffle(corpus)
    return corpus


# ---------------------------------------------------------------------------------------------------------------------
# contestants


def trainers(corpus: list[str], vocab_size: int, threads: int) -> dict[str, Callable[[], Any]]:
    """Each library's training of a vocabulary of `vocab_size` ordinary tokens on the texts, one by one."""
    import rustbpe
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from tokenizers import trainers as library

    from vibechat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

    def ours() -> list[bytes]:
        size = vocab_size + len(SPECIAL_TOKENS)
        return RustBPETokenizer.train_from_iterator(iter(corpus), size, num_threads=threads).tokens

    def published() -> list[bytes]:
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(corpus), vocab_size, pattern=SPLIT_PATTERN)
        return [bytes(token) for token, _ in sorted(tokenizer.get_mergeable_ranks(), key=lambda item: item[1])]

    def hugging_face() -> None:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = library.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(iter(corpus), trainer)

    return {"vibechat": ours, "rustbpe": published, "tokenizers": hugging_face}


def encoders(tokens: list[bytes], trained: Any, threads: int) -> dict[str, Callable[[list[str]], list[list[int]]]]:
    """Each library's encoding of a list of texts with the same vocabulary, made anew."""
    import tiktoken

    from vibechat.tokenizer import SPLIT_PATTERN, RustBPETokenizer

    ours = RustBPETokenizer(tokens, {"<|bos|>": len(tokens)})
    ours.encode("the encoder is built on first use")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    baseline = tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return {
        "vibechat": lambda texts: ours.encode(texts, num_threads=threads),
        "tiktoken": lambda texts: baseline.encode_ordinary_batch(texts, num_threads=threads),
        "rustbpe": trained.batch_encode,
    }


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(contestants: Callable[[], dict[str, Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each contestant in each round; every other round runs in the opposite order."""
    times: dict[str, list[float]] = {}
    for i in range(rounds):
        fresh = list(contestants().items())
        for name, work in fresh if i % 2 == 0 else reversed(fresh):
            times.setdefault(name, []).append(seconds(work))
            print(f"  round {i + 1}: {name} {times[name][-1]:.3f} s", file=sys.stderr)
    return times


def rows_of(task: str, threads: int, megabytes: float, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row of the table for each contestant: median seconds, MB/s, and how much faster we are than it."""
    rows = []
    for name, own in times.items():
        ratios = [theirs / ours for theirs, ours in zip(own, times["vibechat"], strict=True)]
        median = statistics.median(own)
        bar = BARS.get((task.split(",")[0], name))
        ratio = statistics.median(ratios)
        rows.append(
            {
                "task": task,
                "threads": threads,
                "library": name,
                "seconds": median,
                "megabytes_per_second": megabytes / median,
                "vibechat_is_faster_by": ratio,
                "bar": bar,
                "met": bar is None or ratio >= bar,
            }
        )
    return rows


def encoding_of(
    parts: list[list[str]], tokens: list[bytes], trained: Any, threads: int, pool_threads: int
) -> Callable[[], dict[str, Callable[[], Any]]]:
    """What makes new contestants, each of which encodes all parts, one part at a time."""

    def work(encode: Callable[[list[str]], Any]) -> Callable[[], Any]:
        return lambda: [encode(part) for part in parts]

    def contestants() -> dict[str, Callable[[], Any]]:
        fresh = encoders(tokens, trained, threads)
        if threads != pool_threads:
            del fresh["rustbpe"]  # its number of threads is fixed for the process
        return {name: work(encode) for name, encode in fresh.items()}

    return contestants


def measure(corpus: list[str], vocab_size: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """All rows. Raises AssertionError if the contestants disagree about merges or ids."""
    import rustbpe

    from vibechat.tokenizer import SPLIT_PATTERN

    megabytes = sum(len(text.encode()) for text in corpus) / 1e6
    training = trainers(corpus, vocab_size, threads)
    tokens = training["vibechat"]()
    assert tokens == training["rustbpe"](), "the merges differ from those of the rustbpe package"
    rows = rows_of("train", threads, megabytes, take_turns(lambda: training, rounds))

    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(corpus), len(tokens), pattern=SPLIT_PATTERN)
    expected = encoders(tokens, trained, threads)["tiktoken"](corpus)
    batches = [corpus[i : i + LOADER_BATCH] for i in range(0, len(corpus), LOADER_BATCH)]
    tasks = [("encode", [corpus], threads), (f"encode, {LOADER_BATCH} at a time", batches, threads)]
    if threads > 1:
        tasks.append(("encode", [corpus], 1))
    for task, parts, count in tasks:
        rows += rows_of(task, count, megabytes, take_turns(encoding_of(parts, tokens, trained, count, threads), rounds))
    assert encoders(tokens, trained, threads)["vibechat"](corpus) == expected, "the ids differ from tiktoken's"
    return rows


def environment(arguments: list[str], corpus: list[str], vocab_size: int) -> dict[str, Any]:
    """What the numbers depend on."""
    digest = hashlib.sha256()
    for text in corpus:
        digest.update(text.encode())
    libraries = ("rustbpe", "tokenizers", "tiktoken")
    return {
        "command": " ".join(["python -m bench.tokenizer", *arguments]),
        "commit": commit_of(Path(__file__).parent),
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "vocab_size": vocab_size,
        "documents": len(corpus),
        "bytes": sum(len(text.encode()) for text in corpus),
        "sha256": digest.hexdigest(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# the program


def print_report(facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """What was measured, on what, and the table."""
    print(f"{facts['command']}  (commit {facts['commit']})")
    libraries = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(f"{facts['device']}; Python {facts['python']}; {libraries}")
    megabytes, documents = facts["bytes"] / 1e6, facts["documents"]
    print(f"{megabytes:.1f} MB in {documents:,} distinct documents; vocabulary {facts['vocab_size']:,}\n")
    print(f"{'task':<24}{'threads':>8}  {'library':<12}{'seconds':>9}{'MB/s':>9}{'we are':>10}  bar")
    for row in rows:
        own = row["library"] == "vibechat"
        ratio = "" if own else f"{row['vibechat_is_faster_by']:.2f}x"
        bar = "" if row["bar"] is None else f"{row['bar']:.1f}x {'met' if row['met'] else 'MISSED'}"
        print(
            f"{row['task']:<24}{row['threads']:>8}  {row['library']:<12}{row['seconds']:>9.3f}"
            f"{row['megabytes_per_second']:>9.1f}{ratio:>10}  {bar}".rstrip()
        )


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 if `--check` is given and a bar was missed."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.tokenizer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="GLOB", help="more text: parquet, jsonl or plain files"
    )
    parser.add_argument("--text-column", default="text", help="of parquet and jsonl (default: text)")
    parser.add_argument("--max-mb", type=float, default=80, help="stop at so many megabytes of text (default: 80)")
    parser.add_argument("--vocab-size", type=int, default=65536, help="ordinary tokens (default: 65536)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every contestant (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    options = parser.parse_args(arguments)

    # both are read when the libraries make their thread pools, on first use
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.threads > 1 else "false"

    corpus = load_corpus(options.data, options.text_column, int(options.max_mb * 1e6))
    facts = environment(arguments, corpus, options.vocab_size)
    rows = measure(corpus, options.vocab_size, options.threads, options.rounds)
    print_report(facts, rows)
    if options.json:
        print(json.dumps({**facts, "rows": rows}))
    return int(options.check and not all(row["met"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
