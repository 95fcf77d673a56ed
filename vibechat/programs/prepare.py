"""Make shards of your own text: deduplicated, filtered, normalized.

It reads parquet, jsonl and txt files and writes parquet shards into a new directory, which `--data` then takes. Nothing
but the flags changes a document, and the manifest says how many were dropped and why.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vibechat.common import UserError, get_base_dir
from vibechat.configurator import run_program
from vibechat.sources import local
from vibechat.sources.shards import HashCache


@dataclass(frozen=True)
class Config:
    """What `vibechat prepare` takes."""

    data: str = ""
    """what to read: a directory, or globs of parquet, jsonl and txt, separated by commas"""
    out: str = ""
    """the directory to make; it must not exist yet"""
    text_column: str = "text"
    """the column or field that holds a document's text"""
    # --- What stays
    dedup: bool = False
    """drop a document that equals an earlier one"""
    min_chars: int = 0
    """drop documents shorter than this"""
    max_chars: int = -1
    """drop documents longer than this; -1 keeps them all"""
    normalize: Literal["none", "nfc"] = "none"
    """nfc: rewrite text in Unicode normalization form C before anything else"""


def prepare(config: Config) -> None:
    """Write the shards and say what came of it."""
    if not config.data or not config.out:
        raise UserError("prepare needs --data, the text to read, and --out, the directory to make")
    out = Path(config.out).expanduser().absolute()
    if out.exists():
        raise UserError(f"--out {config.out}: exists already; delete it, or name another directory")
    settings = local.PrepareSettings(
        text_column=config.text_column,
        dedup=config.dedup,
        min_chars=config.min_chars,
        max_chars=config.max_chars,
        normalize=config.normalize,
    )
    files = local.expand(config.data)
    cache = HashCache(Path(get_base_dir()) / "data" / "hashes.json")
    live = sys.stdout.isatty()

    def progress(counts: dict[str, int]) -> None:
        print(f"\r{counts['read']:,} documents read, {counts['kept']:,} kept", end="", flush=True)

    try:
        made = local.prepare_shards(files, out, settings, cache, progress=progress if live else None)
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written: {error.strerror}") from error
    finally:
        if live:
            print("\r\033[K", end="")
    counts = made.counts
    dropped = {name: counts[name] for name in ("empty", "too_short", "too_long", "duplicate") if counts[name]}
    reasons = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.items()) or "none dropped"
    print(f"read      {counts['read']:,} documents from {len(files):,} files")
    print(f"kept      {counts['kept']:,} ({reasons})")
    if config.normalize != "none":
        print(f"rewritten {counts['normalized']:,} in normalization form C")
    print(f"wrote     {counts['text_bytes'] / 1e6:.1f} MB of text in {len(made.shards['train']):,} shards")
    print(f"use it    --data {out}")


def main(argv: list[str] | None = None) -> int:
    """Read the command line, prepare, return the exit status."""
    return run_program(prepare, Config, argv, prog="vibechat prepare", description=(__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    raise SystemExit(main())
