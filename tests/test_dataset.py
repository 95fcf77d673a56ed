"""Sources of text: a person's own files become two splits, or one clear line says why not."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibechat.common import UserError
from vibechat.dataset import Dataset, open_dataset
from vibechat.sources.shards import (
    HashCache,
    RowGroup,
    Shard,
    ShardDirectory,
    ShardWriter,
    inspect_shard,
    publish_directory,
    read_documents,
)


def write_parquet(path: Path, texts: list[str | None], group: int = 4, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=group)
    return path


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts_of(dataset: Dataset) -> tuple[list[str], list[str]]:
    return list(dataset.iter_texts("train")), list(dataset.iter_texts("val"))


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# which documents train, which validate


def test_the_last_file_validates(tmp_path: Path) -> None:
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(6)])
    dataset = open_dataset(f"{tmp_path}/*.parquet")
    assert texts_of(dataset) == ([f"{n}{i}" for n in "ab" for i in range(6)], [f"c{i}" for i in range(6)])
    assert dataset.name == tmp_path.name
    assert dataset.manifest["documents"] == {"train": 12, "val": 6}
    assert [group.documents for group in dataset.row_groups("train")] == [4, 2, 4, 2]


def test_a_directory_is_the_files_of_known_kinds_in_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b1"}, {"text": "b2"}])
    (tmp_path / "c.txt").write_text("c\n")
    (tmp_path / "README.md").write_text("no")
    assert texts_of(open_dataset(str(tmp_path))) == (["a", "b1", "b2"], ["c\n"])


def test_val_data_validates_and_all_else_trains(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a1", "a2"])
    write_parquet(tmp_path / "b.parquet", ["b"])
    val = write_jsonl(tmp_path / "val.jsonl", [{"text": "v"}])
    dataset = open_dataset(f"{tmp_path}/*.parquet", val_data=str(val))
    assert texts_of(dataset) == (["a1", "a2", "b"], ["v"])
    with pytest.raises(UserError, match=r"val\.jsonl: is in --data and in --val-data"):
        open_dataset(str(tmp_path), val_data=str(val))


@pytest.mark.parametrize(("documents", "validates"), [(2, 1), (19, 1), (20, 1), (60, 3), (100, 5)])
def test_of_one_file_the_last_five_per_cent_validate(tmp_path: Path, documents: int, validates: int) -> None:
    texts = [str(i) for i in range(documents)]
    write_parquet(tmp_path / "a.parquet", list(texts), group=7)
    assert texts_of(open_dataset(str(tmp_path))) == (texts[:-validates], texts[-validates:])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in texts])
    assert texts_of(open_dataset(str(tmp_path / "b.jsonl"))) == (texts[:-validates], texts[-validates:])


def test_one_txt_file_is_cut_at_a_line_near_its_end(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    (train,), (val,) = texts_of(open_dataset(str(tmp_path / "input.txt")))
    assert train + val == text
    assert train.endswith("\n")
    assert 0.93 < len(train) / len(text) < 0.97


def test_one_parquet_document_cannot_train_and_validate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet: 1 document.*--val-data"):
        open_dataset(str(write_parquet(tmp_path / "a.parquet", ["one"])))


def test_max_chars_cuts_the_last_document(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["aaaa", None, "", "bbbb", "cccc", "dddd"])
    dataset = open_dataset(str(tmp_path))
    assert list(dataset.iter_texts(max_chars=6)) == ["aaaa", "bb"]
    assert list(dataset.iter_texts(max_chars=8)) == ["aaaa", "bbbb"]
    assert list(dataset.iter_texts(max_chars=0)) == []
    assert list(dataset.iter_texts()) == ["aaaa", "bbbb", "cccc"]


# ---------------------------------------------------------------------------------------------------------------------
# fingerprints


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    write_parquet(tmp_path / "here" / "a.parquet", ["a", "b", "c"])
    first = open_dataset(str(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert open_dataset(str(tmp_path / "there")).fingerprint == first.fingerprint
    assert json.loads(json.dumps(first.manifest)) == first.manifest
    write_parquet(tmp_path / "there" / "a.parquet", ["a", "b", "d"])
    assert open_dataset(str(tmp_path / "there")).fingerprint != first.fingerprint


def test_a_changed_source_is_prepared_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    first = open_dataset(str(path))
    again = open_dataset(str(path))
    assert again.fingerprint == first.fingerprint
    assert again.manifest == first.manifest
    write_jsonl(path, [{"text": "a"}, {"text": "longer"}])
    assert texts_of(open_dataset(str(path))) == (["a"], ["longer"])


def test_the_hash_cache_hashes_a_file_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    cache = HashCache(tmp_path / "cache" / "hashes.json")
    (first,) = cache.get([path])
    assert HashCache(tmp_path / "cache" / "hashes.json").get([path]) == [first]
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert cache.get([path]) != [first]
    cache.put(path, "known")
    monkeypatch.setattr("vibechat.sources.shards.file_sha256", lambda _: pytest.fail("hashed again"))
    assert cache.get([path]) == ["known"]


# ---------------------------------------------------------------------------------------------------------------------
# what a person gets wrong


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", "b"], column="content")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; it has content.*--text-column"):
        open_dataset(str(path))
    assert texts_of(open_dataset(str(path), text_column="content")) == (["a"], ["b"])


def test_large_and_dictionary_columns_are_text_too(tmp_path: Path) -> None:
    for name, kind in (("a", pa.large_string()), ("b", pa.dictionary(pa.int32(), pa.string()))):
        pq.write_table(pa.table({"text": pa.array(["x", None, "x"]).cast(kind)}), tmp_path / f"{name}.parquet")
    assert texts_of(open_dataset(str(tmp_path))) == (["x", "x"], ["x", "x"])


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", "b"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"a\.parquet: .*file.*"):
        open_dataset(str(tmp_path / "a.parquet"), base_dir=tmp_path / "file")


def test_a_column_that_is_no_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column 'text' holds int64"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("pattern", ["nothing/*.parquet", "empty", "missing.txt"])
def test_an_empty_glob_says_what_could_be_given(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{pattern.replace('*', '.')}: no such files; give builtin"):
        open_dataset(str(tmp_path / pattern))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"a\.csv: do not know how to read \.csv"):
        open_dataset(f"{tmp_path}/*")


def test_what_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\nthr\xffee\n", r"a\.txt, line 3: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xe9"}\n', r"a\.jsonl, line 3: not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl, line 2: no field 'text'; it has body"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2: no field 'text'; it is not an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2: field 'text' is int, not text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', r"a\.jsonl, line 2: .*surrogate"),
        ("a.jsonl", b"", r"a\.jsonl: no document is left"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing_behind(
    tmp_path: Path, base_dir: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        open_dataset(str(tmp_path / name))
    assert "\n" not in str(raised.value)
    assert [path.name for path in (base_dir / "data").iterdir() if not path.name.endswith((".lock", ".json"))] == []


def test_jsonl_lines_end_at_newlines_only(tmp_path: Path) -> None:
    text = "a\u2028b\x85c"
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _ in range(2))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts_of(open_dataset(str(tmp_path))) == ([text], [text])


# ---------------------------------------------------------------------------------------------------------------------
# shards


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=200),
    st.integers(1, 2000),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_hold_what_was_written(tmp_path: Path, texts: list[str], shard_bytes: int) -> None:
    with publish_directory(tmp_path / "shards") as temporary:
        writer = ShardWriter(temporary, shard_bytes=shard_bytes)
        for text in texts:
            writer.add(text)
        ShardDirectory(temporary, {"train": writer.close()}).save()
    directory = ShardDirectory.load(tmp_path / "shards")
    assert directory is not None
    dataset = Dataset("x", directory.shards)
    read = [text for group in dataset.row_groups("train") for some in dataset.read(group) for text in some]
    assert read == texts
    for shard in directory.shards["train"]:
        assert inspect_shard(shard.path, "text") == shard.row_groups
    directory.verify(HashCache(tmp_path / "hashes.json"))


@pytest.mark.parametrize("start", [0, 3, 70])
@pytest.mark.parametrize("first", [0, 1, 64, 129])
def test_reading_from_the_middle_of_a_part_of_a_row_group(tmp_path: Path, start: int, first: int) -> None:
    texts = [str(i) for i in range(400)]
    path = write_parquet(tmp_path / "a.parquet", list(texts), group=250)
    group = RowGroup(path, 1, start, 140)
    read = [text for some in read_documents(group, "text", first) for text in some]
    assert read == texts[250 + start + first : 250 + 140]


def test_a_damaged_shard_is_named_and_refused(tmp_path: Path, base_dir: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i) * 100} for i in range(100)])
    dataset = open_dataset(str(source))
    (shard,) = {Path(name) for name in dataset.manifest["files"]["train"]}
    column = pq.read_metadata(shard).row_group(0).column(0)
    flip_a_bit(shard, column.data_page_offset + column.total_compressed_size - 1)
    os.utime(shard)
    with pytest.raises(UserError, match=r"shard_00000\.parquet: corrupt: its sha256"):
        open_dataset(str(source))
    with pytest.raises(UserError, match=r"shard_00000\.parquet: row group \d+ cannot be read"):
        list(dataset.iter_texts())
    shard.unlink()
    with pytest.raises(UserError, match=r"shard_00000\.parquet: .*missing"):
        open_dataset(str(source))


def test_a_truncated_shard_is_named_and_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [str(i) * 50 for i in range(100)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
        open_dataset(str(tmp_path))


def test_text_that_is_not_utf8_inside_a_shard_is_named(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"\xff\xfe"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, raw.buffers())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 cannot be read"):
        list(open_dataset(str(tmp_path)).iter_texts("val"))


def test_a_shard_that_ends_early_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", "b"])
    with pytest.raises(UserError, match="ends after 2 documents"):
        list(Dataset("x", {"train": [Shard(path, "", 0, (5,))]}).iter_texts())


def test_publishing_is_all_or_nothing(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with publish_directory(final) as temporary:
        (temporary / "a").write_text("first")
        assert not final.exists()
    with pytest.raises(FileNotFoundError), publish_directory(final) as temporary:
        (temporary / "missing" / "a").write_text("second")
    assert (final / "a").read_text() == "first"
    with publish_directory(final) as temporary:
        (temporary / "b").write_text("third")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
