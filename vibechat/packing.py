"""Documents -> rows of tokens: the order in which training sees text, as a pure function that can stop anywhere.

An epoch deals the row groups of a dataset, shuffled by (seed, epoch), to L lanes (64, or as many as there are row
groups): lane l reads groups l, l + L, l + 2L, ... of the shuffled list, one document after the other. Rows come from
the lanes in turn: row i of an epoch comes from lane i mod L, as long as no lane is exhausted; an exhausted lane is
skipped (the row comes from the next lane that is not) and the epoch ends when all lanes are.

A lane holds a buffer of at most 64 documents, and takes no more once it has 16 rows' worth of tokens (that would not
make the packing better, only the start slower). A row is filled by best fit: the largest piece of the buffer that still
fits, the earlier one of equals; if none fits, the largest piece of all is cut to fill the row exactly, and what remains
of it returns to the buffer. Every piece starts with its own <|bos|>, so every row does too, and nothing is discarded:
in an epoch every token of every document appears exactly once. Where one place is left in a row, it takes a <|bos|>
alone. A lane's last row may be short.

What is kept of a lane is the number of the next document that it reads and, for each piece in its buffer, the number of
its document and how many of its tokens are used up. All else follows, so a state is a few kilobytes of JSON.
"""

import hashlib
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vibechat.common import UserError

LANES = 64
BUFFER_DOCUMENTS = 64
BUFFER_ROWS = 16

Tokens = npt.NDArray[np.int32]
Encode = Callable[[list[str]], list[Tokens]]
LaneState = tuple[int, tuple[tuple[int, int], ...]]  # (next document, ((document, tokens used), ...))


class Group(Protocol):
    """A run of documents; `vibechat.sources.shards.RowGroup` is one."""

    @property
    def documents(self) -> int:
        """How many documents there are."""


class TextSource(Protocol):
    """What the packer asks of a dataset."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the order of documents depends on."""

    def row_groups(self, split: str) -> list[Any]:
        """The row groups of a split, in their fixed order."""

    def read(self, group: Any, first: int = 0) -> Iterator[list[str]]:
        """The documents of a group from its `first` on, a few at a time."""


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that depends on nothing but the arguments, on any machine and Python version."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}/{epoch}/{i}".encode()).digest())


class Lane:
    """One reader of documents with its buffer of pieces.

    Documents are numbered in the order in which the lane reads them; one of no tokens takes a number and no more.
    """

    def __init__(
        self,
        source: TextSource,
        groups: list[Any],
        encode: Encode,
        bos: int,
        batch_documents: int,
        state: LaneState = (0, ()),
    ) -> None:
        """Args: groups: what to read, in order; batch_documents: how many to tokenize at once; state: from `state`."""
        self._source, self._encode, self._bos = source, encode, bos
        self._batch_documents = batch_documents
        self._groups = groups
        self._next, self._saved = state  # a saved buffer is tokenized again at first use, so that resuming starts soon
        self._sizes: list[tuple[int, int]] = []  # sorted (size with <|bos|>, -document): the pieces in the buffer
        self._pieces: dict[int, tuple[Tokens, int]] = {}  # document -> (all its tokens, how many are used)
        self._buffered_tokens = 0
        self._ahead: deque[tuple[int, Tokens]] = deque()  # tokenized, but not in the buffer yet
        self._reader: Iterator[tuple[int, str]] | None = None

    @property
    def state(self) -> LaneState:
        """Where the lane stands."""
        if self._saved:
            return self._next, self._saved
        return self._next, tuple((document, self._pieces[document][1]) for document in sorted(self._pieces))

    def fill_row(self, row: Tokens) -> int:
        """Fill `row` (length T + 1); return how much is filled: less than all only at the lane's end, after that 0."""
        if self._saved:
            self._restore()
        filled = 0
        while filled < len(row):
            self._top_up(len(row))
            if not self._sizes:
                break
            space = len(row) - filled
            row[filled] = self._bos
            at = bisect_right(self._sizes, (space, 0)) - 1
            if at >= 0:
                size, negative = self._sizes.pop(at)
                tokens, used = self._pieces.pop(-negative)
                row[filled + 1 : filled + size] = tokens[used:]
                self._buffered_tokens -= size
                filled += size
            else:
                if space > 1:
                    size, negative = self._sizes.pop()
                    tokens, used = self._pieces[-negative]
                    row[filled + 1 :] = tokens[used : used + space - 1]
                    self._pieces[-negative] = (tokens, used + space - 1)
                    insort(self._sizes, (size - (space - 1), negative))
                    self._buffered_tokens -= space - 1
                filled = len(row)
        return filled

    def _add(self, document: int, tokens: Tokens, used: int) -> None:
        size = 1 + len(tokens) - used
        insort(self._sizes, (size, -document))
        self._pieces[document] = (tokens, used)
        self._buffered_tokens += size

    def _top_up(self, row_length: int) -> None:
        """Move documents into the buffer until it is full or there are none left."""
        while not self._sizes or (
            len(self._sizes) < BUFFER_DOCUMENTS and self._buffered_tokens < BUFFER_ROWS * row_length
        ):
            if not self._ahead and not self._tokenize_ahead():
                return
            document, tokens = self._ahead.popleft()
            self._next = document + 1
            if len(tokens):
                self._add(document, tokens, 0)

    def _tokenize_ahead(self) -> bool:
        """Tokenize the next documents; False if there are none."""
        if self._reader is None:
            self._reader = self._documents_from(self._next)
        batch = list(islice(self._reader, self._batch_documents))
        encoded = self._encode([text for _, text in batch])
        self._ahead.extend((document, tokens) for (document, _), tokens in zip(batch, encoded, strict=True))
        return bool(batch)

    def _documents_from(self, first: int) -> Iterator[tuple[int, str]]:
        """(number, text) of the documents from number `first` on."""
        begin = 0
        for group in self._groups:
            document = max(begin, first)
            begin += group.documents
            if document < begin:
                for texts in self._source.read(group, document - (begin - group.documents)):
                    for text in texts:
                        yield document, text
                        document += 1

    def _restore(self) -> None:
        """Read and tokenize the documents of a saved buffer."""
        wanted = dict(self._saved)
        self._saved = ()
        texts: dict[int, str] = {}
        begin = 0
        for group in self._groups:
            inside = [document for document in wanted if begin <= document < begin + group.documents]
            if inside:
                document = min(inside)
                for some in self._source.read(group, document - begin):
                    texts.update({d: text for d, text in enumerate(some, document) if d in wanted})
                    document += len(some)
                    if document > max(inside):
                        break
            begin += group.documents
        missing = [document for document in wanted if document not in texts]
        if missing:
            raise UserError(f"the loader state names document {missing[0]} of a lane that has only {begin}")
        for (document, used), tokens in zip(wanted.items(), self._encode([texts[d] for d in wanted]), strict=True):
            if used >= len(tokens):
                raise UserError(
                    f"the loader state has used {used} tokens of a document of {len(tokens)}: it belongs to other data"
                )
            self._add(document, tokens, used)


class Packer:
    """Rows of T + 1 tokens, one after the other, through all lanes and epochs."""

    def __init__(
        self,
        source: TextSource,
        encode: Encode,
        bos: int,
        *,
        split: str,
        seed: int,
        shuffle: bool,
        batch_documents: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Args: shuffle: shuffle and go on for ever; else one pass in fixed order. state: what `state()` returned."""
        self._source, self._encode, self._bos = source, encode, bos
        self._seed, self._shuffle, self._batch_documents = seed, shuffle, batch_documents
        self._groups = source.row_groups(split)
        if not any(group.documents for group in self._groups):
            raise UserError(f"the {split} split of the data has no documents")
        self.epoch = 0
        self.row = 0  # how many rows were packed so far, all epochs together: the number of the next one
        self._lane = 0  # whose turn it is
        if state is None:
            self._start_epoch([(0, ())] * self.lane_count)
        else:
            self.epoch, self.row, self._lane = state["epoch"], state["row"], state["lane"]
            if len(state["lanes"]) != self.lane_count:
                raise UserError(f"the loader state has {len(state['lanes'])} lanes, this data has {self.lane_count}")
            self._start_epoch([(next_, tuple((d, u) for d, u in buffer)) for next_, buffer in state["lanes"]])

    @property
    def lane_count(self) -> int:
        """How many lanes there are."""
        return min(LANES, len(self._groups))

    def _start_epoch(self, states: list[LaneState]) -> None:
        count = self.lane_count
        order = list(range(len(self._groups)))
        if self._shuffle:
            order = shuffled(len(self._groups), self._seed, self.epoch)
        self._lanes = [
            Lane(
                self._source,
                [self._groups[i] for i in order[lane::count]],
                self._encode,
                self._bos,
                self._batch_documents,
                states[lane],
            )
            for lane in range(count)
        ]
        self._lane_states: list[LaneState | None] = list(states)

    def next_row(self, row: Tokens) -> int:
        """Pack the next row into `row` and return how much of it is filled; 0 at the end of a single pass."""
        for _ in range(2):  # this epoch, then, if it is over, the next one
            for _ in range(self.lane_count):
                lane = self._lane
                self._lane = (lane + 1) % self.lane_count
                self._lane_states[lane] = None
                filled = self._lanes[lane].fill_row(row)
                if filled:
                    self.row += 1
                    return filled
            if not self._shuffle:
                return 0
            self.epoch += 1
            self._lane = 0
            self._start_epoch([(0, ())] * self.lane_count)
        raise UserError("the data has documents, but all of them are empty")

    def state(self) -> tuple[int, int, int, tuple[LaneState, ...]]:
        """(epoch, row, lane whose turn it is, lane states): cheap to take, immutable; `state_json` makes it JSON."""
        for lane, known in enumerate(self._lane_states):
            if known is None:
                self._lane_states[lane] = self._lanes[lane].state
        return self.epoch, self.row, self._lane, tuple(state for state in self._lane_states if state is not None)
