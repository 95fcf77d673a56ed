"""How fast text becomes batches: `python -m bench.loader`.

Tokens a second that one `Loader` hands out with nobody computing on them, at each number of tokenizer threads, and how
long the first batch and a resume take. A trainer waits for data only if it is faster than this. The text is the
built-in corpus, or `--data`; the tokenizer is the one of the base directory, or one that is trained on the text first.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from vibechat.common import get_base_dir
from vibechat.dataloader import Loader
from vibechat.dataset import Dataset, open_dataset
from vibechat.tokenizer import RustBPETokenizer, get_tokenizer


def tokens_per_second(
    dataset: Dataset, tokenizer: RustBPETokenizer, B: int, T: int, batches: int, threads: int
) -> float:
    """Input tokens a second over `batches` micro-batches, after the first one."""
    with Loader(dataset, tokenizer, B, T, tokenizer_threads=threads) as loader:
        next(loader)
        begin = time.perf_counter()
        for _ in itertools.islice(loader, batches):
            pass
        return batches * B * T / (time.perf_counter() - begin)


def seconds_to_first_batch(
    dataset: Dataset, tokenizer: RustBPETokenizer, B: int, T: int, state: dict[str, Any] | None
) -> float:
    """From making a loader to having a batch of it."""
    begin = time.perf_counter()
    with Loader(dataset, tokenizer, B, T, state=state) as loader:
        next(loader)
        return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="builtin", help="as for training")
    parser.add_argument("--shape", default="8x512,32x2048", help="micro-batches, BxT, separated by commas")
    parser.add_argument("--batches", type=int, default=500, help="how many micro-batches a round hands out")
    parser.add_argument("--rounds", type=int, default=5, help="the median over so many")
    arguments = parser.parse_args(argv)
    dataset = open_dataset(arguments.data)
    if (Path(get_base_dir()) / "tokenizer").exists():
        tokenizer = get_tokenizer()
    else:
        tokenizer = RustBPETokenizer.train_from_iterator(dataset.iter_texts(max_chars=20_000_000), 8192)
    results = []
    print(f"{'B x T':>10}  {'threads':>7}  {'tokens/s':>12}  {'first batch':>11}  {'resume':>8}  state")
    for B, T in (map(int, shape.split("x")) for shape in arguments.shape.split(",")):
        for threads in (1, 2, 4):
            speed = statistics.median(
                tokens_per_second(dataset, tokenizer, B, T, arguments.batches, threads) for _ in range(arguments.rounds)
            )
            with Loader(dataset, tokenizer, B, T) as loader:
                for _ in itertools.islice(loader, arguments.batches):
                    pass
                state = loader.state_dict()
            first, resume = (
                statistics.median(
                    seconds_to_first_batch(dataset, tokenizer, B, T, start) for _ in range(arguments.rounds)
                )
                for start in (None, state)
            )
            size = len(json.dumps(state))
            shape = f"{B}x{T}"
            print(f"{shape:>10}  {threads:>7}  {speed:>12,.0f}  {first:>9.3f} s  {resume:>6.3f} s  {size / 1e3:.1f} kB")
            results.append({"B": B, "T": T, "threads": threads, "tokens_per_second": speed, "resume_seconds": resume})
    print(json.dumps({"data": dataset.name, "vocab": tokenizer.get_vocab_size(), "results": results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
