"""Downloads against a hub on the loopback interface that drops connections, truncates, corrupts and refuses."""

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.file_download
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_server import COMMIT, HubServer
from vibechat import dataset
from vibechat.common import UserError
from vibechat.dataset import open_dataset
from vibechat.sources import hub
from vibechat.sources.shards import HashCache

SOURCE = hub.HubSource("tiny", "someone/tiny-shuffle", 4)
NAMES = [SOURCE.file(index) for index in range(4)]


def parquet_bytes(number: int) -> bytes:
    rng = random.Random(number)
    texts = [f"shard {number} document {i} " + rng.randbytes(2000).hex() for i in range(20)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=8)
    return sink.getvalue().to_pybytes()


CONTENT = {name: parquet_bytes(number) for number, name in enumerate(NAMES)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(SOURCE.repo, dict(CONTENT))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what a drop costs at most; 10 MB
    monkeypatch.setitem(hub.SOURCES, "tiny", SOURCE)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> hub.ShardStore:
    return hub.ShardStore(SOURCE, tmp_path / "tiny", HashCache(tmp_path / "hashes.json"))


def download(store: hub.ShardStore, count: int, **options: int) -> int:
    return hub.download(store, count, backoff_seconds=0, **options)


def contents(store: hub.ShardStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.directory.glob("*.parquet")}


def test_the_first_shards_and_the_last_arrive_with_a_manifest(server: HubServer, store: hub.ShardStore) -> None:
    assert download(store, 2) == 3
    assert contents(store) == {name: CONTENT[name] for name in (NAMES[0], NAMES[1], NAMES[3])}
    manifest = json.loads((store.directory / "manifest.json").read_text())
    assert manifest["revision"] == COMMIT
    assert manifest["shards"][NAMES[0]]["row_groups"] == [8, 8, 4]
    assert manifest["shards"][NAMES[0]]["documents"] == 20
    assert not list(store.directory.glob("*.incomplete"))
    splits = store.open(2)
    assert [shard.path.name for shard in splits["train"]] == NAMES[:2]
    assert [shard.path.name for shard in splits["val"]] == NAMES[3:]


def test_what_is_here_needs_no_network(server: HubServer, store: hub.ShardStore) -> None:
    download(store, 2)
    server.requests.clear()
    assert download(store, 2) == 0
    assert download(store, 1) == 0
    assert server.requests == []
    assert download(store, 3) == 1
    assert sum(method == "GET" and "resolve" in path for method, path, _ in server.requests) == 1
    # The revision stays the one of the first download, so nobody is asked for it again.
    assert not any(path.startswith("/api") and method == "GET" for method, path, _ in server.requests)


def test_a_dropped_connection_is_continued_where_it_broke(server: HubServer, store: hub.ShardStore) -> None:
    server.faults[NAMES[0]] = [("drop", 10_000), ("drop", 20_000)]
    download(store, 1)
    assert contents(store)[NAMES[0]] == CONTENT[NAMES[0]]
    asked = [range_ for _, path, range_ in server.requests if path.endswith(NAMES[0])]
    assert asked == [None, "bytes=10000-", "bytes=30000-"]
    assert server.bytes_sent[NAMES[0]] == len(CONTENT[NAMES[0]])


def test_a_later_run_continues_what_an_earlier_one_left(server: HubServer, store: hub.ShardStore) -> None:
    store.directory.mkdir(exist_ok=True)
    (store.directory / f"{NAMES[0]}.incomplete").write_bytes(CONTENT[NAMES[0]][:12_345])
    download(store, 1)
    assert contents(store)[NAMES[0]] == CONTENT[NAMES[0]]
    assert server.bytes_sent[NAMES[0]] == len(CONTENT[NAMES[0]]) - 12_345


def test_a_failed_download_leaves_its_part_for_the_next(server: HubServer, store: hub.ShardStore) -> None:
    server.faults[NAMES[0]] = [("drop", 5_000), ("status", 404)]
    with pytest.raises(UserError, match=NAMES[0]):
        download(store, 1)
    assert (store.directory / f"{NAMES[0]}.incomplete").stat().st_size == 5_000
    assert NAMES[0] not in contents(store)
    assert download(store, 1) == 1
    assert server.bytes_sent[NAMES[0]] == len(CONTENT[NAMES[0]])


def test_a_server_that_ignores_ranges_does_not_spoil_the_file(server: HubServer, store: hub.ShardStore) -> None:
    server.faults[NAMES[0]] = [("drop", 10_000), ("whole",)]
    download(store, 1)
    assert contents(store)[NAMES[0]] == CONTENT[NAMES[0]]


def test_a_truncated_answer_is_continued(server: HubServer, store: hub.ShardStore) -> None:
    server.faults[NAMES[0]] = [("short", 1_000)]
    download(store, 1)
    assert contents(store)[NAMES[0]] == CONTENT[NAMES[0]]
    assert server.bytes_sent[NAMES[0]] == len(CONTENT[NAMES[0]])


def test_a_partial_file_that_is_too_long_is_begun_again(server: HubServer, store: hub.ShardStore) -> None:
    (store.directory / f"{NAMES[0]}.incomplete").write_bytes(b"x" * (len(CONTENT[NAMES[0]]) + 1))
    download(store, 1)
    assert contents(store)[NAMES[0]] == CONTENT[NAMES[0]]


def test_a_corrupt_transfer_is_noticed_and_begun_again(server: HubServer, store: hub.ShardStore) -> None:
    server.faults[NAMES[1]] = [("corrupt",)]
    download(store, 2)
    assert contents(store)[NAMES[1]] == CONTENT[NAMES[1]]
    assert server.bytes_sent[NAMES[1]] == 2 * len(CONTENT[NAMES[1]])


def test_a_shard_that_stays_corrupt_is_named_and_refused(server: HubServer, store: hub.ShardStore) -> None:
    server.faults[NAMES[1]] = [("corrupt",)]
    server.sticky.add(NAMES[1])
    with pytest.raises(UserError, match=rf"{NAMES[1]}: failed after 5 attempts: .*corrupt"):
        download(store, 2)
    assert sorted(contents(store)) == [NAMES[0], NAMES[3]]  # the others are there
    with pytest.raises(UserError, match=r"shards of tiny are missing.*--source tiny -n 2"):
        store.open(2)
    assert store.open(1)["train"][0].path.name == NAMES[0]


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_in_trouble_is_asked_again(server: HubServer, store: hub.ShardStore, status: int) -> None:
    server.faults[NAMES[0]] = [("status", status)] * 3
    server.faults["api"] = [("status", status)]
    assert download(store, 1) == 2


def test_a_refusal_is_final_and_names_the_token(server: HubServer, store: hub.ShardStore) -> None:
    server.faults[NAMES[0]] = [("status", 403)] * 2
    with pytest.raises(UserError, match=rf"{NAMES[0]}: failed: HTTP 403.*HF_TOKEN"):
        download(store, 1)
    assert sum(path.endswith(NAMES[0]) for _, path, _ in server.requests) == 1


def test_the_token_of_the_environment_is_sent(
    server: HubServer, store: hub.ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "hf_secret"
    with pytest.raises(UserError, match="HF_TOKEN"):
        download(store, 1)
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert download(store, 1) == 2


def test_offline_is_offline_at_once(
    server: HubServer, store: hub.ShardStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(UserError, match="failed: OfflineModeIsEnabled: offline mode is enabled"):
        download(store, 1)
    assert capsys.readouterr().err == ""


def test_redirects_are_followed(server: HubServer, store: hub.ShardStore) -> None:
    server.redirect = True
    server.faults[NAMES[0]] = [("drop", 100)]
    download(store, 1)
    assert contents(store)[NAMES[0]] == CONTENT[NAMES[0]]


def test_no_server_at_all_is_one_line(store: hub.ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"someone/tiny-shuffle at http://127.0.0.1:9: failed after 5") as raised:
        download(store, 1)
    assert "\n" not in str(raised.value)


def test_a_shard_that_the_hub_does_not_have(server: HubServer, store: hub.ShardStore) -> None:
    del server.files[NAMES[1]]
    with pytest.raises(UserError, match=f"has no {NAMES[1]}"):
        download(store, 2)


def test_too_small_a_disk_is_said_before_anything_is_fetched(
    server: HubServer, store: hub.ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = hub.shutil.disk_usage(store.directory)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage._replace(free=hub.RESERVED_BYTES + 1000))
    with pytest.raises(UserError, match=r"2 shards need .* GB, .* are to spare on the disk"):
        download(store, 1)
    assert not server.bytes_sent


def test_a_shard_without_an_entry_is_not_fetched_again(server: HubServer, store: hub.ShardStore) -> None:
    (store.directory / NAMES[0]).write_bytes(CONTENT[NAMES[0]])  # killed between the rename and the manifest
    (store.directory / NAMES[3]).write_bytes(b"something else")
    assert download(store, 1) == 2
    assert server.bytes_sent[NAMES[0]] == 0
    assert contents(store) == {name: CONTENT[name] for name in (NAMES[0], NAMES[3])}


def test_a_shard_that_rotted_on_disk_is_refused_and_then_fetched_again(
    server: HubServer, store: hub.ShardStore
) -> None:
    download(store, 1)
    path = store.directory / NAMES[0]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{NAMES[0]}: corrupt"):
        store.open(1)
    assert download(store, 1) == 1
    assert contents(store)[NAMES[0]] == CONTENT[NAMES[0]]
    store.open(1)


def test_two_downloads_at_once_share_the_work(server: HubServer, store: hub.ShardStore) -> None:
    threads = [threading.Thread(target=download, args=(store, 3)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(store) == CONTENT
    assert all(server.bytes_sent[name] == len(CONTENT[name]) for name in NAMES)
    assert sorted(json.loads((store.directory / "manifest.json").read_text())["shards"]) == NAMES


@pytest.mark.parametrize("count", [0, 4, -2])
def test_a_count_that_cannot_be_is_refused(store: hub.ShardStore, count: int) -> None:
    with pytest.raises(UserError, match="3 training shards: ask for 1 to 3"):
        download(store, count)


def test_the_real_sources_are_as_large_as_they_are() -> None:
    for name, shards, last in (("fineweb-edu", 1823, "shard_01822.parquet"), ("climbmix", 6543, "shard_06542.parquet")):
        wanted = hub.SOURCES[name].wanted(-1)
        assert len(wanted) == len(set(wanted)) == shards
        assert wanted[-1] == last
        assert hub.SOURCES[name].wanted(2) == ["shard_00000.parquet", "shard_00001.parquet", last]


def test_as_many_shards_as_the_text_needs() -> None:
    source = hub.SOURCES["fineweb-edu"]
    assert source.shards_for(1) == 1
    assert source.shards_for(11_219_763_200) == 225  # depth 20
    assert source.shards_for(1, 2e9) == 8  # a tokenizer of 65,536
    assert source.shards_for(1e12) == 1822  # all but the one that validates


# ---------------------------------------------------------------------------------------------------------------------
# as a person sees it


def test_open_dataset_downloads_what_was_asked_for_and_uses_what_is_here(server: HubServer, base_dir: Path) -> None:
    with pytest.raises(UserError, match=r"shards of tiny are missing: run `python -m vibechat.dataset --source tiny"):
        open_dataset("tiny")
    two = open_dataset("tiny", num_shards=2)
    assert two.name == "tiny"
    assert (two.documents("train"), two.documents("val")) == (40, 20)
    assert next(two.iter_texts("val")).startswith("shard 3 document 0")
    assert open_dataset("tiny").fingerprint == two.fingerprint
    assert open_dataset("tiny", num_shards=1).fingerprint != two.fingerprint
    with pytest.raises(UserError, match="val-data"):
        open_dataset("tiny", val_data="x")


def test_a_download_that_fails_says_what_can_be_done_without(
    server: HubServer, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--data builtin needs no network"):
        open_dataset("tiny", num_shards=1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    open_dataset("tiny", num_shards=2)
    server.faults[NAMES[2]] = [("status", 404)]
    with pytest.raises(UserError, match="--num-shards -1 takes the 2 that are here"):
        open_dataset("tiny", num_shards=3)


def test_the_command_downloads_and_ends_with_success(
    server: HubServer, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dataset.main(["--source", "tiny", "-n", "2", "-w", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{NAMES[0]}: " in out
    assert "(3 of 3)" in out
    assert "2 training shards and 1 to validate" in out


def test_the_command_ends_with_2_and_names_the_shard(
    server: HubServer, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults[NAMES[1]] = [("status", 404)]
    assert dataset.main(["--source", "tiny", "-n", "2"]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"error: {NAMES[1]}: failed")


def test_bars_are_shown_on_a_terminal(
    server: HubServer, store: hub.ShardStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    server.faults[NAMES[0]] = [("drop", 1000), ("status", 500)]
    assert download(store, 1) == 2
    assert "shards" in capsys.readouterr().out
