"""Shards of pretraining text from the Hugging Face hub: resumed, verified, published by rename, listed in a manifest.

A source is a dataset repository of parquet files shard_00000.parquet, ... whose last one validates. The first request
fixes the revision (a commit), the second asks for size and sha256 of all wanted shards; then each shard is fetched into
`<name>.incomplete`, which a later run continues, is hashed, and only then gets its name and its entry in manifest.json.
Whatever is in the manifest needs no network any more.

Transfers are huggingface_hub's (`http_get`: range requests, redirects, tokens), so HF_ENDPOINT, HF_TOKEN and proxies
work as everywhere. Its `hf_hub_download` is not used because it discards a partial file when a download fails.
"""

import contextlib
import errno
import itertools
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vibechat.common import UserError
from vibechat.sources.shards import (
    HashCache,
    Shard,
    file_sha256,
    inspect_shard,
    read_json,
    shard_entry,
    shard_from_entry,
    verify_shards,
    write_json_atomically,
)

T = TypeVar("T")

ATTEMPTS = 5
# How much text there is: in a shard of about 100 MB, and in a token of a vocabulary of 65,536.
CHARACTERS_PER_SHARD = 250e6
CHARACTERS_PER_TOKEN = 5.0
RESERVED_BYTES = 1 << 30  # of the disk, left free for what else a run writes


@dataclass(frozen=True)
class HubSource:
    """A repository of shards."""

    name: str
    repo: str
    shards: int  # how many there are; the last one validates

    def file(self, index: int) -> str:
        """The name of a shard."""
        return f"shard_{index:05d}.parquet"

    def wanted(self, count: int) -> list[str]:
        """The first `count` training shards (-1: all of them) and the one that validates."""
        training = self.shards - 1
        if not (count == -1 or 1 <= count <= training):
            raise UserError(f"{self.name} has {training:,} training shards: ask for 1 to {training}, or -1 for all")
        return [self.file(index) for index in range(training if count == -1 else count)] + [self.file(training)]

    def shards_for(self, tokens: float, characters: float = 0) -> int:
        """How many training shards hold so many tokens, and so many characters; all of them, where they hold less."""
        wanted = max(tokens * CHARACTERS_PER_TOKEN, characters) / CHARACTERS_PER_SHARD
        return min(max(1, math.ceil(wanted)), self.shards - 1)


SOURCES = {
    source.name: source
    for source in (
        HubSource("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", 1823),
        HubSource("climbmix", "karpathy/climbmix-400b-shuffle", 6543),
    )
}


class ShardStore:
    """The shards of a source that are here: a directory with its manifest."""

    def __init__(self, source: HubSource, directory: Path, cache: HashCache) -> None:
        """Args: directory: created if missing."""
        self.source, self.directory, self.cache = source, directory, cache
        directory.mkdir(parents=True, exist_ok=True)

    def manifest(self) -> dict[str, Any]:
        """{"revision": commit or None, "shards": {file name: entry}, ...}."""
        manifest = read_json(self.directory / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("repo") != self.source.repo:
            return {"version": 1, "source": self.source.name, "repo": self.source.repo, "revision": None, "shards": {}}
        return manifest

    @contextlib.contextmanager
    def changed_manifest(self) -> Iterator[dict[str, Any]]:
        """The manifest to change; written when the body ends. Several processes may do so."""
        from filelock import FileLock

        with FileLock(self.directory / "manifest.lock"):
            manifest = self.manifest()
            yield manifest
            write_json_atomically(self.directory / "manifest.json", manifest)

    def shards(self, names: list[str]) -> list[Shard]:
        """Those of the named shards that the manifest has, in that order."""
        entries = self.manifest()["shards"]
        return [shard_from_entry(self.directory, entries[name]) for name in names if name in entries]

    def open(self, count: int) -> dict[str, list[Shard]]:
        """The splits: the first `count` training shards, or all that are here for -1, and the last one to validate.

        Raises UserError if they are not all here, or one is not what the manifest says.
        """
        names = self.source.wanted(count)
        found = self.shards(names)
        missing = len(names) - len(found)
        if count == -1:
            missing = 0 if len(found) >= 2 and found[-1].path.name == names[-1] else 1
        if missing:
            raise UserError(
                f"{self.directory}: shards of {self.source.name} are missing: "
                f"run `python -m vibechat.dataset --source {self.source.name} -n {8 if count == -1 else count}`"
            )
        verify_shards(found, self.cache)
        return {"train": found[:-1], "val": found[-1:]}


# ---------------------------------------------------------------------------------------------------------------------
# downloading


def download(store: ShardStore, count: int, *, workers: int = 4, backoff_seconds: float = 1.0) -> int:
    """Fetch what is missing of the first `count` training shards (-1: all) and of the one that validates.

    Args:
        workers: shards at a time.
        backoff_seconds: the pause after a first failure of a shard; it doubles.

    Returns:
        How many shards were fetched.

    Raises:
        UserError: naming the shards that could not be had after ATTEMPTS each (the others are fetched all the same),
            or if the disk is too small.
    """
    missing = _missing(store, store.source.wanted(count))
    if not missing:
        return 0
    stop = threading.Event()
    failures: list[str] = []
    with _progress(len(missing), stop) as progress, ThreadPoolExecutor(workers) as pool:
        retry = _Retry(progress, stop, backoff_seconds)
        revision, wanted = retry(f"{store.source.repo} at {_endpoint()}", lambda: _ask_hub(store, missing))
        with store.changed_manifest() as manifest:
            manifest["revision"] = revision
        _check_disk(store, wanted)
        fetches = [pool.submit(_fetch, store, name, *wanted[name], revision, progress, retry) for name in missing]
        try:
            for fetch in fetches:
                try:
                    fetch.result()
                except UserError as error:
                    failures.append(str(error))
        except BaseException:  # Ctrl-C: let the workers go
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        more = f" (and {len(failures) - 1} more shards)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}; what arrived is kept: run the same command again")
    return len(missing)


def _missing(store: ShardStore, names: list[str]) -> list[str]:
    """The names of shards that are not here; one that is, but is not what the manifest says, is removed first."""
    here = {shard.path.name: shard for shard in store.shards(names) if shard.path.is_file()}
    hashes = store.cache.get([shard.path for shard in here.values()])
    for (name, shard), sha256 in zip(list(here.items()), hashes, strict=True):
        if sha256 != shard.sha256:
            print(f"{name}: corrupt, fetching it again", file=sys.stderr)
            del here[name]
            shard.path.unlink()
    return [name for name in names if name not in here]


class _Retry:
    """Calls something until it works, ATTEMPTS times at most, with pauses that double."""

    def __init__(self, progress: "_Progress", stop: threading.Event, backoff_seconds: float) -> None:
        self._progress, self._stop, self._backoff_seconds = progress, stop, backoff_seconds

    def __call__(self, what: str, action: Callable[[], T]) -> T:
        """What `action` returns. Raises UserError, starting with `what`, if it fails for good."""
        for attempt in itertools.count(1):
            try:
                return action()
            except UserError:
                raise
            except Exception as error:  # whatever the network, the hub or the disk came up with
                if self._stop.is_set():
                    raise UserError(f"{what}: interrupted") from error
                if attempt == ATTEMPTS or _is_final(error):
                    tries = f" after {attempt} attempts" if attempt > 1 else ""
                    raise UserError(f"{what}: failed{tries}: {_reason(error)}") from error
                self._progress.note(f"{what}: {_reason(error)}; attempt {attempt + 1} of {ATTEMPTS}")
                self._stop.wait(self._backoff_seconds * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _ask_hub(store: ShardStore, names: list[str]) -> tuple[str, dict[str, tuple[int, str]]]:
    """The revision to fetch, which stays the one of the first download, and {name: (size in bytes, sha256)}."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint())
    repo = store.source.repo
    revision = store.manifest()["revision"] or api.dataset_info(repo).sha
    known: dict[str, tuple[int, str]] = {}
    for begin in range(0, len(names), 100):
        for info in api.get_paths_info(repo, names[begin : begin + 100], revision=revision, repo_type="dataset"):
            lfs = getattr(info, "lfs", None)
            if lfs is not None:
                known[info.path] = (lfs.size, lfs.sha256)
    if absent := [name for name in names if name not in known]:
        raise UserError(f"{repo}: has no {absent[0]} at revision {revision}")
    return str(revision), known


def _check_disk(store: ShardStore, wanted: dict[str, tuple[int, str]]) -> None:
    partial = sum(path.stat().st_size for path in store.directory.glob("*.incomplete"))
    needed = sum(size for size, _ in wanted.values()) - partial
    free = shutil.disk_usage(store.directory).free - RESERVED_BYTES
    if needed > free:
        raise UserError(
            f"{store.directory}: {len(wanted):,} shards need {needed / 1e9:.1f} GB, {max(free, 0) / 1e9:.1f} are "
            "to spare on the disk; ask for fewer (-n, --num-shards), or set VIBECHAT_BASE_DIR to a larger disk"
        )


def _fetch(
    store: ShardStore,
    name: str,
    size: int,
    sha256: str,
    revision: str,
    progress: "_Progress",
    retry: _Retry,
) -> None:
    """Fetch one shard and enter it into the manifest. Raises UserError naming it."""
    from filelock import FileLock

    final = store.directory / name
    locks = store.directory / ".locks"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / f"{name}.lock"):  # another process may want it too
        if not (store.shards([name]) and final.is_file()):
            # A file without an entry arrived just before its process was killed.
            if not (final.is_file() and file_sha256(final) == sha256):
                retry(name, lambda: _fetch_once(store, name, size, sha256, revision, progress))
            shard = Shard(final, sha256, size, inspect_shard(final, "text"))
            store.cache.put(final, sha256)
            with store.changed_manifest() as manifest:
                manifest["shards"][name] = shard_entry(shard)
    progress.finished(name, size)


def _fetch_once(store: ShardStore, name: str, size: int, sha256: str, revision: str, progress: "_Progress") -> None:
    """One attempt: continue the partial file, verify it, give it its name."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    partial = store.directory / f"{name}.incomplete"
    if partial.exists() and partial.stat().st_size > size:
        partial.unlink()
    url = hf_hub_url(store.source.repo, name, repo_type="dataset", revision=revision, endpoint=_endpoint())
    with partial.open("ab") as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            expected_size=size,
            headers=build_hf_headers(),
            displayed_filename=name,
            tqdm_class=progress.bar_class(name),
        )
        file.flush()
        os.fsync(file.fileno())
    found = file_sha256(partial)
    if found != sha256:
        partial.unlink()  # there is no telling which byte is wrong
        raise OSError(f"corrupt: its sha256 is {found[:16]}..., the hub says {sha256[:16]}...")
    partial.replace(store.directory / name)


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use: the hub said no, the disk is full, or HF_HUB_OFFLINE is set."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return True
    return status in (400, 401, 403, 404, 410) or isinstance(error, OfflineModeIsEnabled)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"HTTP {status}: the hub wants a token that may read this; set HF_TOKEN"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# progress: bars on a terminal, lines elsewhere


class _Interrupted(Exception):
    """Raised inside a transfer to end it."""


class _Progress:
    """What a person sees: rich bars if `bars` is given, else a line a shard."""

    def __init__(self, total: int, stop: threading.Event, bars: Any = None) -> None:
        self._total, self._stop, self._bars = total, stop, bars
        self._done = 0
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._overall = bars.add_task("shards", total=total, unit="") if bars else None

    def bar_class(self, name: str) -> Any:
        """What http_get shall use as tqdm."""

        def bar(*_: Any, total: int | None = None, initial: int = 0, **__: Any) -> "_Bar":
            if self._bars is None:
                return _Bar(self._stop, None)
            task = self._tasks.setdefault(name, self._bars.add_task(name, total=total))
            self._bars.update(task, completed=initial)
            return _Bar(self._stop, lambda amount: self._bars.advance(task, amount))

        return bar

    def note(self, line: str) -> None:
        """Say something in between."""
        print(line, file=sys.stderr, flush=True)

    def finished(self, name: str, size: int) -> None:
        """A shard is in its place."""
        with self._lock:
            self._done += 1
            if self._bars is None:
                print(f"{name}: {size / 1e6:.1f} MB ({self._done} of {self._total})", flush=True)
            else:
                self._bars.advance(self._overall)
                if name in self._tasks:
                    self._bars.remove_task(self._tasks.pop(name))


class _Bar:
    """The part of tqdm's interface that http_get uses."""

    def __init__(self, stop: threading.Event, advance: Callable[[float], None] | None) -> None:
        self._stop, self._advance = stop, advance

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, amount: float = 1) -> None:
        """`amount` more bytes have come."""
        if self._stop.is_set():
            raise _Interrupted
        if self._advance:
            self._advance(amount)


@contextlib.contextmanager
def _progress(total: int, stop: threading.Event) -> Iterator[_Progress]:
    if not sys.stdout.isatty():
        yield _Progress(total, stop)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:
        yield _Progress(total, stop, bars)
