"""A person's own text: globs of parquet, jsonl and txt files; documents out of them; shards made of those.

A .parquet file has a row a document, in a column of text; a .jsonl file a line a document, in a field of the same name;
a .txt file is one document. Parquet is used where it lies; the rest is first written as shards (`prepare_shards`), with
deduplication, a length filter and Unicode normalization where asked for, and a manifest that says what was done.
"""

import glob
import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vibechat.common import UserError
from vibechat.sources.shards import (
    HashCache,
    RowGroup,
    ShardDirectory,
    ShardWriter,
    inspect_shard,
    publish_directory,
    read_documents,
)

REPORT_DOCUMENTS = 1000
SUFFIXES = (".parquet", ".jsonl", ".txt")


@dataclass(frozen=True)
class PrepareSettings:
    """What happens to documents on their way into shards."""

    text_column: str = "text"
    dedup: bool = False  # drop a document equal to an earlier one (after normalization)
    min_chars: int = 0  # drop documents shorter than this
    max_chars: int = -1  # drop documents longer than this; -1: none is too long
    normalize: str = "none"  # none, or nfc: Unicode normalization form C

    def __post_init__(self) -> None:
        if self.normalize not in ("none", "nfc"):
            raise UserError(f"normalize {self.normalize!r}: must be none or nfc")
        if self.max_chars != -1 and self.max_chars < max(self.min_chars, 1):
            raise UserError(f"max_chars {self.max_chars} leaves no document: it must be -1 or at least min_chars")


def expand(patterns: str) -> list[Path]:
    """The files that patterns name, sorted, absolute.

    A pattern is a path, a glob (`**` crosses directories) or a directory, which stands for the files of known kinds in
    it; several are separated by commas. Raises UserError for one that matches nothing, or a file of another kind.
    """
    files: set[Path] = set()
    for pattern in [patterns] if Path(patterns).exists() else patterns.split(","):
        pattern = pattern.strip()
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (absolute ones too)
            found = [file for file in found if file.is_file()]
        if not found:
            raise UserError(
                f"--data {pattern}: no such files; give builtin, fineweb-edu, climbmix or globs of parquet, jsonl, txt"
            )
        for file in found:
            if file.suffix not in SUFFIXES:
                raise UserError(f"{file}: do not know how to read {file.suffix or 'it'}: must be parquet, jsonl or txt")
            files.add(file.absolute())
    return sorted(files)


# ---------------------------------------------------------------------------------------------------------------------
# files -> documents


def documents(file: Path, text_column: str = "text") -> Iterator[str]:
    """The documents of one file, in order. Raises UserError naming file and line where there is something else."""
    if file.suffix == ".parquet":
        for index, rows in enumerate(inspect_shard(file, text_column)):
            for texts in read_documents(RowGroup(file, index, 0, rows), text_column):
                yield from texts
    elif file.suffix == ".jsonl":
        yield from _jsonl_documents(file, text_column)
    else:
        yield _read_text(file)


def _read_text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}); convert the file"
        ) from error


def _jsonl_documents(file: Path, text_column: str) -> Iterator[str]:
    try:
        lines = file.open("rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    with lines:
        for number, line in enumerate(lines, 1):  # split on \n only: JSON strings may hold U+2028
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x}); convert the file") from error
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error})") from error
            if not isinstance(record, dict) or text_column not in record:
                has = f"it has {', '.join(record)}" if isinstance(record, dict) else "it is not an object"
                raise UserError(f"{where}: no field {text_column!r}; {has}: name one by --text-column")
            text = record[text_column]
            if not isinstance(text, str):
                raise UserError(f"{where}: field {text_column!r} is {type(text).__name__}, not text")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"{where}: field {text_column!r} has half of a surrogate pair") from error
            yield text


def cut_tail(text: str, fraction: float = 0.05) -> tuple[str, str]:
    """A text cut near its end, at the start of a line if there is one near: what trains, what validates."""
    at = int(len(text) * (1 - fraction))
    newline = text.find("\n", at, at + max(len(text) // 100, 1000))
    if 0 <= newline < len(text) - 1:
        at = newline + 1
    return text[:at], text[at:]


# ---------------------------------------------------------------------------------------------------------------------
# documents -> shards


class Preparation:
    """Normalizes, filters and deduplicates a stream of documents, and counts what it dropped."""

    def __init__(self, settings: PrepareSettings, progress: Callable[[dict[str, int]], None] | None = None) -> None:
        self.settings = settings
        self._progress = progress
        self.counts = {"read": 0, "kept": 0, "empty": 0, "too_short": 0, "too_long": 0, "duplicate": 0, "normalized": 0}
        self._seen: set[bytes] = set()

    def __call__(self, texts: Iterable[str]) -> Iterator[str]:
        """The documents that stay, as they stay."""
        settings, counts = self.settings, self.counts
        for text in texts:
            counts["read"] += 1
            if self._progress and counts["read"] % REPORT_DOCUMENTS == 0:
                self._progress(counts)
            if settings.normalize == "nfc" and not unicodedata.is_normalized("NFC", text):
                text = unicodedata.normalize("NFC", text)
                counts["normalized"] += 1
            if not text:
                counts["empty"] += 1
            elif len(text) < settings.min_chars:
                counts["too_short"] += 1
            elif 0 <= settings.max_chars < len(text):
                counts["too_long"] += 1
            elif settings.dedup and self._is_duplicate(text):
                counts["duplicate"] += 1
            else:
                counts["kept"] += 1
                yield text

    def _is_duplicate(self, text: str) -> bool:
        key = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if key in self._seen:
            return True
        self._seen.add(key)
        return False


def source_stamps(files: list[Path]) -> list[dict[str, Any]]:
    """What a manifest remembers of the files that shards were made of, to see later whether they are still the same."""
    return [{"path": str(file), "bytes": file.stat().st_size, "modified_ns": file.stat().st_mtime_ns} for file in files]


def prepare_shards(
    files: list[Path],
    directory: Path,
    settings: PrepareSettings,
    cache: HashCache,
    *,
    split_single: bool = False,
    progress: Callable[[dict[str, int]], None] | None = None,
) -> ShardDirectory:
    """Write the documents of `files` as shards into `directory`, published whole by one rename, with a manifest.

    Args:
        split_single: if all of it is one document, cut it: its end becomes the split "val".
        progress: called with the counts so far, every REPORT_DOCUMENTS documents.

    Raises:
        UserError: for a file that cannot be read as what it is, and where no document is left.
    """
    preparation = Preparation(settings, progress)
    stamps = source_stamps(files)
    with publish_directory(directory) as temporary:
        writer = ShardWriter(temporary)
        stream = preparation(text for file in files for text in documents(file, settings.text_column))
        first, second = next(stream, None), next(stream, None)
        tail = ""
        if first is not None and second is None and split_single:
            first, tail = cut_tail(first)
        for text in (first, second):
            if text:
                writer.add(text)
        for text in stream:
            writer.add(text)
        shards = {"train": writer.close()}
        if tail:
            tail_writer = ShardWriter(temporary, prefix="val_")
            tail_writer.add(tail)
            shards["val"] = tail_writer.close()
        counts = preparation.counts | {"text_bytes": writer.text_bytes + len(tail.encode("utf-8"))}
        if not shards["train"]:
            raise UserError(f"{files[0]}{' ...' if len(files) > 1 else ''}: no document is left ({counts})")
        settings_entry = asdict(settings) | {"split_single": split_single, "sources": stamps}
        ShardDirectory(temporary, shards, settings_entry, counts).save()
    prepared = ShardDirectory.load(directory)
    assert prepared is not None
    for shard in [shard for shards in prepared.shards.values() for shard in shards]:
        cache.put(shard.path, shard.sha256)
    return prepared


def prepared_once(
    files: list[Path],
    directory: Path,
    settings: PrepareSettings,
    cache: HashCache,
    *,
    split_single: bool = False,
    say: Callable[[str], None] = print,
) -> ShardDirectory:
    """`prepare_shards`, or what it made earlier of the same files; what is made now is said."""
    known = ShardDirectory.load(directory)
    expected = asdict(settings) | {"split_single": split_single, "sources": source_stamps(files)}
    if known is not None and known.settings == expected:
        known.verify(cache)
        return known
    size = sum(stamp["bytes"] for stamp in expected["sources"])
    say(f"preparing {len(files):,} {'file' if len(files) == 1 else 'files'} ({size / 1e6:.1f} MB) in {directory}")
    made = prepare_shards(files, directory, settings, cache, split_single=split_single)
    say(f"prepared {made.counts['kept']:,} documents, {made.counts['text_bytes'] / 1e6:.1f} MB of text")
    return made
