"""Parquet shards on disk: writing them, checking them, reading documents out of them.

A shard is a parquet file with one column of text and several row groups; a row is a document. Row groups are what the
loader deals out to its lanes, so a shard that we write has many small ones (ROW_GROUP_DOCUMENTS, ROW_GROUP_BYTES).
A directory of shards is published by renaming it into place, with a manifest.json that names every shard with its
sha256, its size and the rows of each group; nothing that is not whole ever stands under its final name.

Hashing a hundred gigabytes at each start would cost minutes, so `HashCache` remembers the sha256 of a file together
with its size and modification time, and hashes again only when one of these has changed.

pyarrow is imported where it is used: a program that only imports this module must not need it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vibechat.common import UserError

ROW_GROUP_DOCUMENTS = 64
ROW_GROUP_BYTES = 128 << 10
SHARD_BYTES = 256 << 20  # of text; about 100 MB once compressed
READ_DOCUMENTS = 64  # how many documents are decoded at a time


@dataclass(frozen=True)
class Shard:
    """One parquet file: where it is, what its bytes hash to, how many documents each row group holds."""

    path: Path
    sha256: str
    bytes: int
    row_groups: tuple[int, ...]

    @property
    def documents(self) -> int:
        """How many documents the shard holds."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class RowGroup:
    """The documents [start, stop) of row group `index` of a shard."""

    path: Path
    index: int
    start: int
    stop: int

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.stop - self.start


# ---------------------------------------------------------------------------------------------------------------------
# hashes


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json_atomically(path: Path, value: Any) -> None:
    """Write JSON beside `path`, flush it to disk and rename it into place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The value in a JSON file; None where there is no such file or it cannot be read as JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class HashCache:
    """The sha256 of files, remembered by path for as long as size and modification time stay the same."""

    def __init__(self, path: Path) -> None:
        """Args: path: the JSON file that remembers; its directory is created."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def _entries(self) -> dict[str, list[Any]]:
        entries = read_json(self._path)
        return entries if isinstance(entries, dict) else {}

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # One rank hashes, the others wait and find the answer.
        from filelock import FileLock

        with FileLock(self._path.with_suffix(".lock")):
            yield

    def get(self, paths: list[Path]) -> list[str]:
        """The sha256 of each file, computed only for those that changed since they were last hashed."""
        with self._lock():
            entries = self._entries()
            hashes = []
            changed = False
            for path in paths:
                status = path.stat()
                known = entries.get(str(path))
                if not known or known[:2] != [status.st_size, status.st_mtime_ns]:
                    known = entries[str(path)] = [status.st_size, status.st_mtime_ns, file_sha256(path)]
                    changed = True
                hashes.append(known[2])
            if changed:
                write_json_atomically(self._path, entries)
            return hashes

    def put(self, path: Path, sha256: str) -> None:
        """Remember a hash that was just computed."""
        with self._lock():
            entries = self._entries()
            status = path.stat()
            entries[str(path)] = [status.st_size, status.st_mtime_ns, sha256]
            write_json_atomically(self._path, entries)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def inspect_shard(path: Path, text_column: str) -> tuple[int, ...]:
    """The number of documents in each row group of a parquet file.

    Raises UserError if the file is not readable parquet, lacks the column, or the column is not text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            metadata = file.metadata
            rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
    if text_column not in schema.names:
        raise UserError(
            f"{path}: no column {text_column!r}; it has {', '.join(schema.names)}: name one by --text-column"
        )
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {text_column!r} holds {kind}, not text: name another by --text-column")
    return rows


def read_documents(group: RowGroup, text_column: str, first: int = 0) -> Iterator[list[str]]:
    """The documents of a row group from its `first` on, in order, a list of at most READ_DOCUMENTS at a time.

    A missing value (null) is an empty document. Raises UserError naming the shard if its bytes are damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    begin, position = group.start + first, 0
    try:
        with pq.ParquetFile(group.path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(READ_DOCUMENTS, row_groups=[group.index], columns=[text_column]):
                column = batch.column(0)
                low, high = max(begin - position, 0), min(group.stop - position, len(column))
                if low < high:
                    yield [text or "" for text in column.slice(low, high - low).to_pylist()]
                position += len(column)
                if position >= group.stop:
                    return
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{group.path}: row group {group.index} cannot be read ({_first_line(error)}): "
            "the shard is damaged; delete it and fetch or prepare it again"
        ) from error
    if position < group.stop:
        raise UserError(f"{group.path}: row group {group.index} ends after {position} documents: the shard is damaged")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# writing


class ShardWriter:
    """Writes documents as parquet shards `<prefix>00000.parquet`, ... into a directory, in the order they come."""

    def __init__(self, directory: Path, prefix: str = "shard_", shard_bytes: int = SHARD_BYTES) -> None:
        """Args: directory: exists; shard_bytes: how much UTF-8 text goes into a shard before the next one begins."""
        self._directory, self._prefix, self._shard_bytes = directory, prefix, shard_bytes
        self._group: list[str] = []
        self._group_bytes = 0
        self._text_bytes_in_shard = 0
        self._rows: list[int] = []
        self._writer: Any = None
        self._path: Path | None = None
        self.shards: list[Shard] = []
        self.documents = 0
        self.text_bytes = 0

    def add(self, text: str) -> None:
        """Append one document."""
        size = len(text.encode("utf-8"))
        self._group.append(text)
        self._group_bytes += size
        self.documents += 1
        self.text_bytes += size
        if len(self._group) >= ROW_GROUP_DOCUMENTS or self._group_bytes >= ROW_GROUP_BYTES:
            self._flush_group()

    def close(self) -> list[Shard]:
        """Finish the last shard and return all of them."""
        self._flush_group()
        self._close_shard()
        return self.shards

    def _flush_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._group:
            return
        table = pa.table({"text": pa.array(self._group, pa.large_string())})
        if self._writer is None:
            self._path = self._directory / f"{self._prefix}{len(self.shards):05d}.parquet"
            # A dictionary or a minimum of whole documents helps nobody; page checksums make a flipped bit an error.
            self._writer = pq.ParquetWriter(
                self._path,
                table.schema,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
        self._writer.write_table(table, row_group_size=len(self._group))
        self._rows.append(len(self._group))
        self._text_bytes_in_shard += self._group_bytes
        self._group, self._group_bytes = [], 0
        if self._text_bytes_in_shard >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None or self._path is None:
            return
        self._writer.close()
        self.shards.append(
            Shard(self._path, file_sha256(self._path), self._path.stat().st_size, tuple(self._rows)),
        )
        self._writer, self._path, self._rows, self._text_bytes_in_shard = None, None, [], 0


@contextlib.contextmanager
def publish_directory(final: Path) -> Iterator[Path]:
    """A temporary directory beside `final` that becomes it by one rename if the body succeeds, and vanishes if not.

    What stood under the final name is replaced.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        if final.exists():
            aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.old."))
            final.rename(aside / final.name)
            temporary.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass
class ShardDirectory:
    """A published directory of shards: `manifest.json` and what it names."""

    path: Path
    shards: dict[str, list[Shard]]
    settings: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write the manifest into the directory."""
        splits = {split: [shard_entry(shard) for shard in shards] for split, shards in self.shards.items()}
        manifest = {"version": 1, "settings": self.settings, "counts": self.counts, "shards": splits}
        write_json_atomically(self.path / "manifest.json", manifest)

    @staticmethod
    def load(path: Path) -> "ShardDirectory | None":
        """The directory as its manifest describes it; None where there is no usable manifest."""
        manifest = read_json(path / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("version") != 1:
            return None
        shards = {
            split: [shard_from_entry(path, entry) for entry in entries] for split, entries in manifest["shards"].items()
        }
        return ShardDirectory(path, shards, manifest["settings"], manifest["counts"])

    def verify(self, cache: HashCache) -> None:
        """Raise UserError, naming the shard, if one is missing or is not what the manifest says."""
        for shards in self.shards.values():
            verify_shards(shards, cache)


def shard_entry(shard: Shard) -> dict[str, Any]:
    """A shard as it stands in a manifest."""
    return {
        "file": shard.path.name,
        "sha256": shard.sha256,
        "bytes": shard.bytes,
        "documents": shard.documents,
        "row_groups": list(shard.row_groups),
    }


def shard_from_entry(directory: Path, entry: dict[str, Any]) -> Shard:
    """The inverse of `shard_entry`."""
    return Shard(directory / entry["file"], entry["sha256"], entry["bytes"], tuple(entry["row_groups"]))


def verify_shards(shards: list[Shard], cache: HashCache) -> None:
    """Raise UserError, naming the shard, if one is missing or its bytes do not hash to what was recorded."""
    for shard in shards:
        if not shard.path.is_file():
            raise UserError(f"{shard.path}: the manifest beside it names this shard, but it is missing")
    for shard, sha256 in zip(shards, cache.get([shard.path for shard in shards]), strict=True):
        if sha256 != shard.sha256:
            raise UserError(
                f"{shard.path}: corrupt: its sha256 is {sha256[:16]}..., the manifest says {shard.sha256[:16]}...; "
                "delete it and fetch or prepare it again"
            )
