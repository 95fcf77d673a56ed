"""The loader: every token once an epoch, an order that is a pure function, exact resume, ranks that add up to one."""

import gc
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vibechat.common import UserError
from vibechat.dataloader import PREFETCH, Loader, tokenizing_distributed_data_loader
from vibechat.packing import BUFFER_DOCUMENTS, BUFFER_ROWS, LANES, shuffled

BOS = 0


@dataclass(frozen=True)
class FakeGroup:
    number: int
    documents: int


class FakeSource:
    """Documents in memory, in row groups; a character is a token."""

    def __init__(self, groups: list[list[str]], fingerprint: str = "data") -> None:
        self.fingerprint = fingerprint
        self.texts = groups
        self.reads = 0

    def row_groups(self, split: str) -> list[FakeGroup]:
        return [FakeGroup(number, len(texts)) for number, texts in enumerate(self.texts) if texts]

    def read(self, group: FakeGroup, first: int = 0) -> Iterator[list[str]]:
        texts = self.texts[group.number][first:]
        for begin in range(0, len(texts), 3):
            self.reads += 1
            yield texts[begin : begin + 3]


class FakeTokenizer:
    """A token a character; 0 is <|bos|>."""

    def __init__(self, name: str = "characters") -> None:
        self.name = name

    def encode(self, text: Any, prepend: Any = None, append: Any = None, num_threads: int = 8) -> Any:
        return [[ord(c) for c in t] for t in text]

    def get_bos_token_id(self) -> int:
        return BOS

    def fingerprint(self) -> str:
        return self.name


def source_of(lengths: list[list[int]]) -> FakeSource:
    """Row groups of documents of these lengths, in which no two tokens are equal."""
    following = iter(c for c in range(1, sys.maxunicode) if not 0xD800 <= c < 0xE000)
    return FakeSource([["".join(chr(next(following)) for _ in range(length)) for length in group] for group in lengths])


# Row groups of documents: many short ones, some empty, some much longer than a row.
sources = st.lists(
    st.lists(st.one_of(st.integers(0, 6), st.integers(0, 60)), max_size=12), min_size=1, max_size=90
).filter(lambda groups: any(map(sum, groups)))
small_sources = st.lists(
    st.lists(st.one_of(st.integers(0, 6), st.integers(0, 60)), max_size=8), min_size=1, max_size=12
).filter(lambda groups: any(map(sum, groups)))
widths = st.integers(1, 17)


def one_epoch(source: FakeSource, T: int, **options: Any) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets) of each row of the first epoch, one row a batch."""
    with Loader(source, FakeTokenizer(), 1, T, rows_per_step=1, **options) as loader:
        for inputs, targets in loader:
            if loader.epoch:
                return
            yield inputs[0].tolist(), targets[0].tolist()


def rows_of(loader: Loader, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [next(loader) for _ in range(count)]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for (inputs, targets), (other_inputs, other_targets) in zip(ours, theirs, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)


# ---------------------------------------------------------------------------------------------------------------------
# packing


@given(sources, widths, st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_token_of_every_document_appears_once_an_epoch(lengths: list[list[int]], T: int, batch: int) -> None:
    source = source_of(lengths)
    seen: Counter[int] = Counter()
    for inputs, targets in one_epoch(source, T, tokenizer_batch_size=batch):
        valid = sum(target != -1 for target in targets)
        tokens = [inputs[0], *targets[:valid]]
        # What is a target at t is the input at t + 1; ignored targets stand at the end only, over inputs of <|bos|>.
        assert inputs[1 : valid + 1] == targets[:valid][: T - 1]
        assert targets[valid:] == [-1] * (T - valid)
        assert inputs[valid + 1 :] == [BOS] * (T - valid - 1)
        assert inputs[0] == BOS
        seen.update(token for token in tokens if token != BOS)
    assert seen == Counter(ord(c) for group in source.texts for text in group for c in text)


@given(small_sources, widths)
@settings(max_examples=40, deadline=None)
def test_a_piece_is_a_run_of_one_document_and_pieces_come_in_order(lengths: list[list[int]], T: int) -> None:
    source = source_of(lengths)
    begin_of = {ord(c): text for group in source.texts for text in group for c in text}
    progress: Counter[str] = Counter()
    for inputs, targets in one_epoch(source, T):
        tokens = [inputs[0], *[target for target in targets if target != -1]]
        text = "".join(map(chr, tokens))
        for piece in text.split(chr(BOS)):
            if piece:
                document = begin_of[ord(piece[0])]
                assert document[progress[document] :].startswith(piece)
                progress[document] += len(piece)


@given(sources, widths)
@settings(max_examples=40, deadline=None)
def test_only_the_last_row_of_a_lane_is_short(lengths: list[list[int]], T: int) -> None:
    short = sum(targets[-1] == -1 for _, targets in one_epoch(source_of(lengths), T))
    assert short <= min(LANES, sum(map(bool, lengths)))


def test_best_fit_takes_the_largest_that_fits_and_cuts_the_largest() -> None:
    source = FakeSource([["aaaa", "bb", "ccccccccc", "d"]])
    rows = list(one_epoch(source, 7))
    text = ["".join(chr(token) for token in [*inputs[:1], *targets] if token > 0) for inputs, targets in rows]
    # 8 places: bos aaaa (5), bos bb (3); then bos d (2), and the largest cut to the 6 places left; then its rest.
    assert text == ["aaaabb", "dccccc", "cccc"]


def test_rows_come_from_lanes_in_turn_and_an_exhausted_lane_is_skipped() -> None:
    # Three row groups are three lanes; documents as long as a row, so that a row is a document.
    source = FakeSource([["aaa", "aaa", "aaa"], ["bbb"], ["ccc", "ccc"]])
    with Loader(source, FakeTokenizer(), 1, 3, "val") as loader:
        assert [chr(int(targets[0, 0])) for _, targets in loader] == ["a", "b", "c", "a", "c", "a"]


def test_a_row_of_one_place_left_takes_a_bos() -> None:
    first = next(one_epoch(FakeSource([["aa", "bbbbbbb"]]), 3))
    assert first == ([BOS, ord("a"), ord("a")], [ord("a"), ord("a"), BOS])


def test_the_buffer_is_bounded_by_documents_and_by_rows() -> None:
    many_short = FakeSource([["x"] * 1000])
    with Loader(many_short, FakeTokenizer(), 1, 512) as loader:
        next(loader)
        (_, buffer), *_ = loader.state_dict()["lanes"]
        assert len(buffer) <= BUFFER_DOCUMENTS
    long = FakeSource([["x" * 100] * 1000])
    with Loader(long, FakeTokenizer(), 1, 9) as loader:
        next(loader)
        (_, buffer), *_ = loader.state_dict()["lanes"]
        assert 1 <= len(buffer) <= BUFFER_ROWS * 10 // 100 + 1


# ---------------------------------------------------------------------------------------------------------------------
# order


def test_shuffling_is_a_permutation_that_seed_and_epoch_decide() -> None:
    assert sorted(shuffled(100, 42, 0)) == list(range(100))
    assert shuffled(100, 42, 0) == shuffled(100, 42, 0)
    assert len({tuple(shuffled(100, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    # What a checkpoint relies on must be the same tomorrow and elsewhere.
    assert shuffled(8, 42, 0) == [6, 7, 2, 3, 0, 5, 4, 1]


@given(small_sources, widths, st.integers(0, 3), st.integers(1, 4), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_order_does_not_depend_on_how_documents_are_tokenized(
    lengths: list[list[int]], T: int, seed: int, threads: int, batch: int
) -> None:
    source = source_of(lengths)
    with Loader(source, FakeTokenizer(), 2, T, seed=seed) as loader:
        expected = rows_of(loader, 12)
    with Loader(
        source, FakeTokenizer(), 2, T, seed=seed, tokenizer_threads=threads, tokenizer_batch_size=batch
    ) as loader:
        assert_same(rows_of(loader, 12), expected)


def test_epochs_and_seeds_differ_in_order_and_not_in_content() -> None:
    source = source_of([[10, 10]] * 20)
    orders = {}
    for seed in (1, 2):
        with Loader(source, FakeTokenizer(), 1, 21, seed=seed) as loader:
            rows = [tuple(next(loader)[1][0].tolist()) for _ in range(40)]
        assert set(rows[:20]) == set(rows[20:])
        orders[seed] = (tuple(rows[:20]), tuple(rows[20:]))
    assert len({orders[1][0], orders[1][1], orders[2][0], orders[2][1]}) == 4


def test_val_is_one_pass_in_a_fixed_order_whatever_the_seed() -> None:
    source = source_of([[10, 3], [5], [40]])
    passes = []
    for seed in (1, 2):
        with Loader(source, FakeTokenizer(), 2, 7, "val", seed=seed) as loader:
            passes.append(list(loader))
            with pytest.raises(StopIteration):
                next(loader)
    assert_same(passes[0], passes[1])
    targets = torch.cat([targets for _, targets in passes[0]])
    assert set(targets.unique().tolist()) - {-1, BOS} == {ord(c) for g in source.texts for t in g for c in t}


# ---------------------------------------------------------------------------------------------------------------------
# resume


@given(small_sources, widths, st.integers(1, 3), st.integers(1, 7), st.integers(0, 25), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_resume_at_any_micro_batch_equals_no_interruption(
    lengths: list[list[int]], T: int, B: int, rows_per_step: int, stop: int, batch: int
) -> None:
    source = source_of(lengths)
    options: dict[str, Any] = {"rows_per_step": rows_per_step, "tokenizer_batch_size": batch}
    with Loader(source, FakeTokenizer(), B, T, **options) as loader:
        rows_of(loader, stop)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = rows_of(loader, 12)
        last, epoch = loader.state_dict(), loader.epoch
    with Loader(source, FakeTokenizer(), B, T, state=state, **options) as loader:
        assert loader.state_dict() == state
        assert_same(rows_of(loader, 12), expected)
        assert loader.state_dict() == last
        assert loader.epoch == epoch


@given(small_sources, widths, st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_resume_at_another_world_size_loses_and_repeats_no_row(
    lengths: list[list[int]], T: int, before: int, after: int, rows_per_step: int, steps: int
) -> None:
    source = source_of(lengths)
    expected = steps_of_rows(source, T, 1, 2, rows_per_step, steps + 4)
    state = None
    first = steps_of_rows(source, T, before, 2, rows_per_step, steps)
    with Loader(source, FakeTokenizer(), 2, T, rows_per_step=rows_per_step, world_size=before) as loader:
        rows_of(loader, steps * loader.micro_batches_per_step)
        state = loader.state_dict()
    second = steps_of_rows(source, T, after, 3, rows_per_step, 4, state)
    assert first + second == expected


def test_resume_in_the_middle_of_a_step_with_another_micro_batch_ends_the_step_where_it_ended() -> None:
    source = source_of([[5] * 4] * 6)
    with Loader(source, FakeTokenizer(), 2, 5, rows_per_step=5) as loader:
        assert loader.micro_batches_per_step == 3
        next(loader)
        state = loader.state_dict()
        rest = [row for _ in range(2) for row in valid_rows(*next(loader))]
        following = [row for _ in range(3) for row in valid_rows(*next(loader))]
    with Loader(source, FakeTokenizer(), 3, 5, rows_per_step=5, state=state) as loader:
        assert valid_rows(*next(loader)) == rest
        assert [row for _ in range(2) for row in valid_rows(*next(loader))] == following


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dataset": "x"}, "other data"),
        ({"tokenizer": "x"}, "tokenizer"),
        ({"seed": 7}, "seed"),
        ({"version": 0}, "version"),
    ],
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any], word: str) -> None:
    source = source_of([[5] * 4] * 3)
    with Loader(source, FakeTokenizer(), 1, 4) as loader:
        state = loader.state_dict()
    with pytest.raises(UserError, match=word):
        Loader(source, FakeTokenizer(), 1, 4, state=state | change)
    with pytest.raises(UserError, match="split"):
        Loader(source, FakeTokenizer(), 1, 4, "val", state=state)


def test_a_state_that_names_tokens_that_are_not_there_is_an_error_of_next() -> None:
    source = source_of([[5] * 4])
    with Loader(source, FakeTokenizer(), 1, 4) as loader:
        next(loader)
        state = loader.state_dict()
    for lane in ([4, [[3, 99]]], [4, [[50, 0]]]):
        damaged = state | {"lanes": [lane]}
        with (
            Loader(source, FakeTokenizer(), 1, 4, state=damaged) as loader,
            pytest.raises(UserError, match="loader state"),
        ):
            next(loader)


def test_the_state_is_what_was_handed_out_and_not_what_was_prefetched() -> None:
    source = source_of([[50] * 10] * 3)
    with Loader(source, FakeTokenizer(), 1, 5) as loader:
        assert loader.state_dict()["row"] == 0
        rows_of(loader, 3)
        while loader._queue.qsize() < PREFETCH:  # the thread runs ahead, and stops there
            threading.Event().wait(0.001)
        assert loader.state_dict()["row"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# ranks and steps


def valid_rows(inputs: torch.Tensor, targets: torch.Tensor) -> list[tuple[int, ...]]:
    """The rows of a batch that are no padding, each as one tuple."""
    return [
        (*row, *target)
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True)
        if any(t != -1 for t in target)
    ]


def steps_of_rows(
    source: FakeSource, T: int, world_size: int, B: int, rows_per_step: int, steps: int, state: Any = None
) -> list[list[tuple[int, ...]]]:
    """For each step the rows that all ranks saw together, in an order that does not depend on the ranks."""
    seen: list[list[tuple[int, ...]]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        with Loader(
            source,
            FakeTokenizer(),
            B,
            T,
            rows_per_step=rows_per_step,
            rank=rank,
            world_size=world_size,
            state=state,
        ) as loader:
            for rows in seen:
                for _ in range(loader.micro_batches_per_step):
                    rows.extend(valid_rows(*next(loader)))
    return [sorted(rows) for rows in seen]


@given(small_sources, widths, st.integers(2, 4), st.integers(1, 3), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_ranks_together_see_what_one_rank_sees_in_the_same_steps(
    lengths: list[list[int]], T: int, world_size: int, B: int, rows_per_step: int
) -> None:
    source = source_of(lengths)
    together = steps_of_rows(source, T, world_size, B, rows_per_step, 5)
    assert together == steps_of_rows(source, T, 1, 4, rows_per_step, 5)
    assert all(len(rows) == rows_per_step for rows in together)


def test_row_i_goes_to_rank_i_mod_world_size_and_the_state_is_the_same_on_all() -> None:
    source = source_of([[6]] * 10)
    with Loader(source, FakeTokenizer(), 1, 6) as loader:
        rows = [valid_rows(*next(loader))[0] for _ in range(10)]
    states = []
    for rank in range(3):
        with Loader(source, FakeTokenizer(), 2, 6, rows_per_step=5, rank=rank, world_size=3) as loader:
            assert loader.micro_batches_per_step == 1
            mine = [row for _ in range(2) for row in valid_rows(*next(loader))]
            assert mine == [rows[i] for i in range(10) if i % 3 == rank]
            states.append(loader.state_dict())
    assert states[0] == states[1] == states[2]


def test_val_gives_every_rank_the_same_number_of_batches() -> None:
    source = source_of([[6]] * 7)
    batches = []
    for rank in range(4):
        with Loader(source, FakeTokenizer(), 1, 6, "val", rank=rank, world_size=4) as loader:
            batches.append(list(loader))
    assert [len(some) for some in batches] == [2, 2, 2, 2]
    assert [len(valid_rows(*some[1])) for some in batches] == [1, 1, 1, 0]
    inputs, targets = batches[3][1]
    assert inputs.unique().tolist() == [BOS]
    assert targets.unique().tolist() == [-1]


# ---------------------------------------------------------------------------------------------------------------------
# the thread


def loader_threads() -> int:
    return sum(thread.name == "vibechat-loader" for thread in threading.enumerate())


def test_batches_are_int64_and_contiguous() -> None:
    with Loader(source_of([[50] * 10]), FakeTokenizer(), 3, 8) as loader:
        inputs, targets = next(loader)
        assert inputs.shape == targets.shape == (3, 8)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        assert loader.wait_seconds > 0
        assert loader.micro_batches_per_step == 1


def test_closing_stops_the_thread_and_ends_the_iteration() -> None:
    before = loader_threads()
    loader = Loader(source_of([[50] * 10]), FakeTokenizer(), 1, 8)
    next(loader)
    assert loader_threads() == before + 1
    loader.close()
    loader.close()
    assert loader_threads() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_a_forgotten_loader_leaves_no_thread() -> None:
    before = loader_threads()
    loader = Loader(source_of([[50] * 10]), FakeTokenizer(), 1, 8)
    next(loader)
    del loader
    gc.collect()
    assert loader_threads() == before


def test_an_error_in_the_thread_is_raised_by_next_as_itself() -> None:
    class Damaged(FakeSource):
        def read(self, group: FakeGroup, first: int = 0) -> Iterator[list[str]]:
            if group.number == 2:
                raise UserError("shard_00002.parquet: the shard is damaged")
            yield from super().read(group, first)

    loader = Loader(Damaged([["a" * 20], ["b" * 20], ["c" * 20]]), FakeTokenizer(), 1, 5, "val")
    rows_of(loader, 2)
    for _ in range(2):  # and it stays so
        with pytest.raises(UserError, match="shard_00002"):
            next(loader)
    loader.close()


def test_interpreter_exit_with_a_running_loader_is_clean() -> None:
    program = (
        "import tests.test_dataloader as t\n"
        "loader = t.Loader(t.source_of([[50] * 10]), t.FakeTokenizer(), 1, 8)\n"
        "next(loader)\n"
        "print('end')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize(
    "options", [{"split": "test"}, {"rank": 1}, {"world_size": 0}, {"rows_per_step": 0}, {"rank": -1, "world_size": 2}]
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Loader(source_of([[5]]), FakeTokenizer(), 1, 4, **options)


def test_a_split_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no documents"):
        Loader(FakeSource([]), FakeTokenizer(), 1, 4)
    with Loader(FakeSource([["", ""]]), FakeTokenizer(), 1, 4) as loader, pytest.raises(UserError, match="empty"):
        next(loader)
    with Loader(FakeSource([["", ""]]), FakeTokenizer(), 1, 4, "val") as loader:
        assert list(loader) == []


def test_the_documented_function_takes_its_rank_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokenizer = source_of([[6]] * 8), FakeTokenizer()
    with Loader(source, tokenizer, 1, 6) as loader:
        rows = [valid_rows(*next(loader))[0] for _ in range(8)]
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        loader = tokenizing_distributed_data_loader(2, 6, "train", dataset=source, tokenizer=tokenizer, device="cpu")
        with loader:
            assert valid_rows(*next(loader)) == [rows[rank], rows[2 + rank]]


def test_with_the_tokenizer_that_is_trained_here() -> None:
    pytest.importorskip("vibechat._rustbpe", reason="the compiled extension is not built")
    from vibechat.tokenizer import RustBPETokenizer

    texts = [f"document {i}: {'the cat sat on the mat, ' * (i % 7)}" for i in range(40)]
    tokenizer = RustBPETokenizer.train_from_iterator(iter(texts), 300)
    source = FakeSource([texts[:15], texts[15:]])
    tokens: Counter[int] = Counter()
    with Loader(source, tokenizer, 2, 16, "val", tokenizer_threads=2) as loader:
        for inputs, targets in loader:
            assert inputs[:, 0].tolist() == [tokenizer.get_bos_token_id()] * 2
            tokens.update(targets.flatten().tolist())
    expected = Counter(token for ids in tokenizer.encode(texts) for token in ids)
    assert {t: n for t, n in tokens.items() if t not in (-1, tokenizer.get_bos_token_id())} == expected


def test_the_documented_function_finds_tokenizer_and_corpus_by_itself(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vibechat._rustbpe", reason="the compiled extension is not built")
    from vibechat.tokenizer import train_tokenizer

    texts = ["the cat sat on the mat"] * 9
    tokenizer = train_tokenizer(texts, 265, base_dir / "tokenizer")
    monkeypatch.setattr("vibechat.dataset.open_dataset", lambda: FakeSource([texts]))
    with tokenizing_distributed_data_loader(2, 8, "val", device="cpu") as loader:
        inputs, _ = next(loader)
    assert tokenizer.decode(inputs[0].tolist()[1:]) == "the cat"
