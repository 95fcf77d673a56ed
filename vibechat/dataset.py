"""Where text comes from: `open_dataset` turns what a person typed after --data into documents that training can read.

    builtin                 language reference, docstrings and sources of the Python that is running; needs no network
    fineweb-edu, climbmix   parquet shards of the hub, downloaded by `python -m vibechat.dataset -n 450`
    anything else           a directory or globs of your own parquet, jsonl or txt files

All of them end as parquet shards with a hash each. Which documents validate: of builtin, whole modules; of a hub
dataset, its last shard; of your own files, --val-data, else the last file, else the last 5% of the documents (of a
single txt file, which is one document, its last 5%).

`Dataset.fingerprint` is a hash over what the order and content of the documents depend on, and nothing else: the same
files in another place are the same dataset.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vibechat.common import UserError, get_base_dir, print0
from vibechat.sources import hub, local
from vibechat.sources.shards import HashCache, RowGroup, Shard, inspect_shard, read_documents

SPLITS = ("train", "val")
VALIDATION_FRACTION = 0.05


class Dataset:
    """Documents in two splits, train and val, that lie in parquet shards."""

    def __init__(
        self,
        name: str,
        shards: dict[str, list[Shard]],
        text_column: str = "text",
        *,
        tail_documents: int = 0,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Describe it; nothing is read.

        Args:
            name: what to call it.
            shards: by split.
            text_column: the column that holds a document's text.
            tail_documents: so many documents at the end of the training shards are the val split instead.
            notes: what else the manifest should say; no part of the fingerprint.
        """
        self.name = name
        self.text_column = text_column
        self._groups = {split: _row_groups(shards.get(split, [])) for split in SPLITS}
        if tail_documents:
            self._groups["train"], self._groups["val"] = _cut_off(self._groups["train"], tail_documents)
        content = {
            "version": 1,
            "text_column": text_column,
            "tail_documents": tail_documents,
            "splits": {split: [_identity(shard) for shard in shards.get(split, [])] for split in SPLITS},
        }
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.manifest: dict[str, Any] = content | {
            "name": name,
            "fingerprint": self.fingerprint,
            "files": {split: [str(shard.path) for shard in shards.get(split, [])] for split in SPLITS},
            "documents": {split: self.documents(split) for split in SPLITS},
            "notes": notes or {},
        }

    def documents(self, split: str) -> int:
        """How many documents a split has."""
        return sum(group.documents for group in self._groups[split])

    def row_groups(self, split: str) -> list[RowGroup]:
        """The row groups of a split, in their fixed order."""
        return list(self._groups[split])

    def read(self, group: RowGroup, first: int = 0) -> Iterator[list[str]]:
        """The documents of a row group from its `first` on, a few at a time. Raises UserError for a damaged shard."""
        return read_documents(group, self.text_column, first)

    def iter_texts(self, split: str = "train", max_chars: int | None = None) -> Iterator[str]:
        """The documents of a split in their fixed order, until `max_chars` characters are through (the last is cut)."""
        left = max_chars
        for group in self._groups[split]:
            for texts in self.read(group):
                for text in texts:
                    if left is not None:
                        text = text[:left]
                        left -= len(text)
                    if text:
                        yield text
                    if left == 0:
                        return


def _identity(shard: Shard) -> dict[str, Any]:
    return {"sha256": shard.sha256, "row_groups": list(shard.row_groups)}


def _row_groups(shards: list[Shard]) -> list[RowGroup]:
    return [
        RowGroup(shard.path, index, 0, rows)
        for shard in shards
        for index, rows in enumerate(shard.row_groups)
        if rows > 0
    ]


def _cut_off(groups: list[RowGroup], documents: int) -> tuple[list[RowGroup], list[RowGroup]]:
    """Split row groups so that the second list has the last `documents` documents."""
    head: list[RowGroup] = list(groups)
    tail: list[RowGroup] = []
    while documents:
        group = head.pop()
        taken = min(documents, group.documents)
        documents -= taken
        tail.insert(0, RowGroup(group.path, group.index, group.stop - taken, group.stop))
        if taken < group.documents:
            head.append(RowGroup(group.path, group.index, group.start, group.stop - taken))
    return head, tail


# ---------------------------------------------------------------------------------------------------------------------
# opening


def open_dataset(
    data: str = "builtin",
    *,
    val_data: str | None = None,
    text_column: str = "text",
    num_shards: int = -1,
    base_dir: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """The dataset that a person named, made ready: built, prepared or downloaded where it has to be.

    Args:
        data: builtin, fineweb-edu, climbmix, a directory, or globs of parquet, jsonl and txt (separated by commas).
        val_data: the same kind of globs, for validation.
        text_column: the column or field that holds the text.
        num_shards: of a hub dataset, use (and download, where missing) this many training shards; -1 those here.
        base_dir: instead of the base directory.
        progress: say what is being done.

    Raises:
        UserError: in one line, if there is no such thing, or it is damaged, empty or of another kind.
    """
    root = Path(base_dir or get_base_dir()) / "data"
    if val_data and (data == "builtin" or data in hub.SOURCES):
        raise UserError(f"--val-data goes with files of your own; {data} has its own validation split")
    try:
        cache = HashCache(root / "hashes.json")
        if data == "builtin":
            return _open_builtin(root, cache, progress)
        if data in hub.SOURCES:
            return _open_hub(hub.SOURCES[data], num_shards, root, cache)
        return _open_files(data, val_data, text_column, root, cache, progress)
    except OSError as error:  # no space, no permission
        raise UserError(f"--data {data}: {error.filename or root}: {error.strerror or error}") from error


def _open_builtin(root: Path, cache: HashCache, progress: bool) -> Dataset:
    from filelock import FileLock

    from vibechat.sources import builtin

    with FileLock(root / "builtin.lock"):  # one rank builds, the others wait
        directory = builtin.open_or_build(root / "builtin", cache, say=print0 if progress else _silent)
    return Dataset("builtin", directory.shards, notes=directory.settings | directory.counts)


def _open_hub(source: hub.HubSource, num_shards: int, root: Path, cache: HashCache) -> Dataset:
    from filelock import FileLock

    store = hub.ShardStore(source, root / source.name, cache)
    if num_shards != -1:
        with FileLock(root / f"{source.name}.lock"):  # one rank downloads, the others wait and find it done
            try:
                hub.download(store, num_shards)
            except UserError as error:
                here = len(store.shards(source.wanted(-1)[:-1]))
                hint = f"--num-shards -1 takes the {here} that are here" if here else "--data builtin needs no network"
                raise UserError(f"{error}; {hint}") from error
    return Dataset(source.name, store.open(num_shards), notes={"revision": store.manifest()["revision"]})


def _open_files(
    data: str, val_data: str | None, text_column: str, root: Path, cache: HashCache, progress: bool
) -> Dataset:
    train, val = local.expand(data), local.expand(val_data) if val_data else []
    if not val and len(train) > 1:
        val = [train.pop()]
    if both := set(train) & set(val):
        raise UserError(f"{min(both)}: is in --data and in --val-data")
    name = _readable_name(data)
    shards, tail = _open_split(train, name, text_column, root, cache, progress, split_single=not val)
    val_shards = tail or _open_split(val, name, text_column, root, cache, progress)[0]
    tail_documents = 0
    if not val_shards:
        documents = sum(shard.documents for shard in shards)
        if documents < 2:
            raise UserError(f"{train[0]}: {documents} document(s) cannot both train and validate: give --val-data")
        tail_documents = max(1, round(VALIDATION_FRACTION * documents))
    dataset = Dataset(name, {"train": shards, "val": val_shards}, text_column, tail_documents=tail_documents)
    for split, files in (("train", train), ("val", val)):
        if not dataset.documents(split):
            raise UserError(f"{files[0]}: no documents, and the {split} split needs some")
    return dataset


def _open_split(
    files: list[Path],
    name: str,
    text_column: str,
    root: Path,
    cache: HashCache,
    progress: bool,
    split_single: bool = False,
) -> tuple[list[Shard], list[Shard]]:
    """The shards of some files: parquet as it is, the rest prepared into a directory of its own.

    With `split_single`, text that is a single document is cut, and its end is what the second list holds.
    """
    from filelock import FileLock

    parquet = [file for file in files if file.suffix == ".parquet"]
    rows = [inspect_shard(file, text_column) for file in parquet]
    shards = [
        Shard(file, sha256, file.stat().st_size, groups)
        for file, sha256, groups in zip(parquet, cache.get(parquet), rows, strict=True)
    ]
    others = [file for file in files if file.suffix != ".parquet"]
    if not others:
        return shards, []
    settings = local.PrepareSettings(text_column=text_column)
    key = hashlib.sha256(json.dumps([text_column, split_single, [str(file) for file in others]]).encode()).hexdigest()
    directory = root / f"{name}-{key[:12]}"
    with FileLock(root / f".{directory.name}.lock"):  # one rank prepares, the others wait
        prepared = local.prepared_once(
            others, directory, settings, cache, split_single=split_single, say=print0 if progress else _silent
        )
    return shards + prepared.shards["train"], prepared.shards.get("val", [])


def _readable_name(patterns: str) -> str:
    """What to call a dataset: the directory or file that the first pattern names."""
    path = Path(patterns.split(",")[0].strip())
    while "*" in path.name or "?" in path.name or "[" in path.name:
        path = path.parent
    return path.absolute().stem or "data"


def _silent(*_: Any) -> None:
    pass


# ---------------------------------------------------------------------------------------------------------------------
# python -m vibechat.dataset -n 450


def main(argv: list[str] | None = None) -> int:
    """Download shards of a hub dataset. Returns 0, or 2 with a line on stderr if any of them could not be had."""
    parser = argparse.ArgumentParser(prog="python -m vibechat.dataset", description="Download pretraining shards.")
    parser.add_argument(
        "-n", "--num-files", type=int, default=-1, help="how many training shards; -1, the default: all"
    )
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="how many at a time")
    parser.add_argument("--source", choices=sorted(hub.SOURCES), default="fineweb-edu", help="which dataset")
    arguments = parser.parse_args(argv)
    try:
        root = Path(get_base_dir()) / "data"
        source = hub.SOURCES[arguments.source]
        store = hub.ShardStore(source, root / source.name, HashCache(root / "hashes.json"))
        fetched = hub.download(store, arguments.num_files, workers=max(arguments.num_workers, 1))
        shards = store.open(arguments.num_files)
        size = sum(shard.bytes for split in shards.values() for shard in split)
        print(
            f"{source.name}: {len(shards['train']):,} training shards and 1 to validate, {size / 1e9:.2f} GB, "
            f"in {store.directory} ({fetched:,} fetched now)"
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
