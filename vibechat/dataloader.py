"""Text -> packed (inputs, targets) on the device: tokenized in a background thread, resumable at any micro-batch.

`vibechat.packing` makes the one global sequence of rows; this file deals it out. Step s is the rows [sR, (s + 1)R) of
it, row i goes to rank i mod world_size, and a rank hands its rows of a step out in micro-batches of B; where they do
not fill the last one, it is padded with rows whose targets are all ignored (-1). So any number of ranks sees together
what one rank would see, in the same steps, and the state after a micro-batch is the same on all of them: rank 0's is
enough, and it may be resumed with another world size, micro-batch or step.

What that costs: where an epoch ends, and which lanes are exhausted, depends on the tokens of every document, so each
rank reads, tokenizes and packs all rows and drops those of the others.
"""

import contextlib
import math
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from vibechat.common import UserError, get_dist_info
from vibechat.packing import Encode, LaneState, Packer, TextSource, Tokens

STATE_VERSION = 1
PREFETCH = 8  # micro-batches that wait ready; tokenizing comes in bursts, this hides them
IGNORED = -1

Batch = tuple[torch.Tensor, torch.Tensor]


class Tokenizer(Protocol):
    """What the loader asks of a tokenizer."""

    def encode(self, text: Any, prepend: Any = None, append: Any = None, num_threads: int = 8) -> Any:
        """A list of texts -> a list of lists of ids."""

    def get_bos_token_id(self) -> int:
        """The id of <|bos|>."""

    def fingerprint(self) -> str:
        """A hash of everything that encoding depends on."""


class Loader:
    """An iterator of micro-batches (inputs, targets), each int64 (B, T) on `device`; targets are -1 where ignored.

    Training goes on for ever, epoch after epoch, each in an order of its own; "val" is one pass in a fixed order and
    ends with StopIteration. Each step is `micro_batches_per_step` calls of next(), on every rank.

    Close it, or let it go out of scope: both stop its thread.
    """

    def __init__(
        self,
        dataset: TextSource,
        tokenizer: Tokenizer,
        B: int,
        T: int,
        split: str = "train",
        *,
        rows_per_step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 42,
        device: torch.device | str = "cpu",
        state: dict[str, Any] | None = None,
        tokenizer_threads: int = 4,
        tokenizer_batch_size: int = 128,
        pin: bool | None = None,
    ) -> None:
        """Start reading.

        Args:
            dataset: from `vibechat.dataset.open_dataset`.
            tokenizer: with encode, get_bos_token_id and fingerprint.
            B: rows in a micro-batch.
            T: tokens in a row; it is cut from T + 1 consecutive ones.
            split: "train" or "val".
            rows_per_step: R, over all ranks; B * world_size if None.
            rank, world_size: which share of the rows to hand out.
            seed: of the order of row groups.
            device: where batches go; on CUDA from pinned memory in one copy that does not block.
            state: what `state_dict` returned, to go on there.
            tokenizer_threads, tokenizer_batch_size: threads, and documents at a time, of tokenizing.
            pin: pinned memory or not; by default where the device is CUDA.

        Raises:
            UserError: if the state belongs to other data, another tokenizer, seed or split, or the split is empty.
        """
        if split not in ("train", "val"):
            raise UserError(f"split {split!r}: there are train and val")
        if min(B, T, world_size) < 1 or not 0 <= rank < world_size or (rows_per_step is not None and rows_per_step < 1):
            raise UserError(f"no loader for B={B}, T={T}, rank {rank} of {world_size}, {rows_per_step} rows a step")
        rows_per_step = rows_per_step or B * world_size
        device = torch.device(device)
        self._device = device
        rows_of_rank = math.ceil(rows_per_step / world_size)
        self.micro_batches_per_step = math.ceil(rows_of_rank / B)
        self.wait_seconds = 0.0
        self._identity = {
            "version": STATE_VERSION,
            "dataset": dataset.fingerprint,
            "tokenizer": tokenizer.fingerprint(),
            "split": split,
            "seed": seed,
        }
        if state is not None:
            self._refuse_another(state)
        encode = array_encoder(tokenizer, tokenizer_threads)
        bos = tokenizer.get_bos_token_id()
        packer = Packer(
            dataset,
            encode,
            bos,
            split=split,
            seed=seed,
            shuffle=split == "train",
            batch_documents=tokenizer_batch_size,
            state=state,
        )
        dealer = Dealer(packer, B, T, bos, rows_per_step, rank, world_size, state)
        pin = device.type == "cuda" if pin is None else pin
        self._position = dealer.position()
        self._failure: BaseException | None = None
        self._queue: queue.Queue[Any] = queue.Queue(PREFETCH)
        stop = threading.Event()
        # The thread knows the queue and not the loader, so that a forgotten loader is collected and its thread stopped.
        thread = threading.Thread(
            target=_prefetch,
            args=(dealer, self._queue, stop, pin, device),
            name="vibechat-loader",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _stop, thread, self._queue, stop)
        thread.start()

    def _refuse_another(self, state: dict[str, Any]) -> None:
        what = {
            "version": "was written by another version of vibechat",
            "dataset": "belongs to other data (a shard was added, removed or changed?)",
            "tokenizer": "belongs to another tokenizer",
            "split": "belongs to another split",
            "seed": "belongs to another seed",
        }
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise UserError(
                    f"cannot resume: the loader state {what[key]} ({key} {state.get(key)}, now {value}); "
                    "continue with what the run began with, or start a new run"
                )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch. Raises StopIteration after the last one of "val", and what went wrong in the thread."""
        if self._failure is not None:
            raise self._failure
        if not self._finalizer.alive:
            raise StopIteration
        begin = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        pair, self._position = item  # (2, B, T)
        if self._device.type != "cpu":
            pair = pair.to(self._device, non_blocking=True)
        return pair[0], pair[1]

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last row handed out."""
        return self._position.epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the batch last handed out ends, whatever was prefetched, as plain JSON values."""
        return self._identity | self._position.to_json()

    def close(self) -> None:
        """Stop the thread. The loader hands out no more."""
        self._finalizer()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Position:
    """A place in the sequence of rows, between two micro-batches."""

    def __init__(self, packed: tuple[int, int, int, tuple[LaneState, ...]], step_row: int, rows_per_step: int) -> None:
        """Args: packed: from `Packer.state`; step_row: the first row of the step that the next row belongs to."""
        self.epoch, self.row, self.lane, self.lanes = packed
        self.step_row, self.rows_per_step = step_row, rows_per_step

    def to_json(self) -> dict[str, Any]:
        """The inverse is in `Packer` and `Dealer`."""
        return {
            "epoch": self.epoch,
            "row": self.row,
            "lane": self.lane,
            "step_row": self.step_row,
            "rows_per_step": self.rows_per_step,
            "lanes": [[next_, [list(piece) for piece in buffer]] for next_, buffer in self.lanes],
        }


class Dealer:
    """Takes rows from a packer and makes one rank's micro-batches of them."""

    def __init__(
        self,
        packer: Packer,
        B: int,
        T: int,
        bos: int,
        rows_per_step: int,
        rank: int,
        world_size: int,
        state: dict[str, Any] | None,
    ) -> None:
        """Args: as of `Loader`."""
        self._packer, self._B, self._T, self._bos = packer, B, T, bos
        self._rows_per_step, self._rank, self._world_size = rows_per_step, rank, world_size
        # A state from the middle of a step finishes that step; with other steps, a new one begins where it stands.
        same_steps = state is not None and state["rows_per_step"] == rows_per_step
        self._step_row = state["step_row"] if same_steps and state is not None else packer.row
        self._row = np.empty(T + 1, np.int32)

    def position(self) -> Position:
        """Where the micro-batch last made ends."""
        return Position(self._packer.state(), self._step_row, self._rows_per_step)

    def micro_batch(self, pin: bool) -> torch.Tensor | None:
        """The next micro-batch, inputs above targets: int64 (2, B, T). None at the end of a single pass."""
        pair = torch.empty(2, self._B, self._T, dtype=torch.int64, pin_memory=pin)
        inputs, targets = pair.numpy()
        packer, T, row = self._packer, self._T, self._row
        first = packer.row
        end = min(first + self._B * self._world_size, self._step_row + self._rows_per_step)
        mine = 0
        while packer.row < end:
            number = packer.row
            filled = packer.next_row(row)
            if not filled:
                break
            if number % self._world_size == self._rank:
                row[filled:] = self._bos
                inputs[mine] = row[:T]
                targets[mine, : filled - 1] = row[1:filled]
                targets[mine, filled - 1 :] = IGNORED
                mine += 1
        if packer.row == first:
            return None
        inputs[mine:] = self._bos
        targets[mine:] = IGNORED
        if packer.row == self._step_row + self._rows_per_step:
            self._step_row = packer.row
        return pair


def array_encoder(tokenizer: Tokenizer, threads: int) -> Encode:
    """A function that tokenizes a list of texts into int32 arrays, the tokenizer's threads running outside the GIL."""

    arrays = getattr(tokenizer, "encode_arrays", None)  # twice as fast: it makes no Python int for each id

    def encode(texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        if arrays is not None:
            return arrays(texts, threads)
        return [np.asarray(ids, np.int32) for ids in tokenizer.encode(texts, num_threads=threads)]

    return encode


def _prefetch(
    dealer: Dealer, ready: "queue.Queue[Any]", stop: threading.Event, pin: bool, device: torch.device
) -> None:
    """The thread: make micro-batches until told to stop, until the end or an error; these go into the queue too."""
    if pin and device.type == "cuda":
        torch.cuda.set_device(device)  # a thread starts on device 0, and pinning there would open a context on it
    while not stop.is_set():
        item: Any
        try:
            pair = dealer.micro_batch(pin)
            item = StopIteration() if pair is None else (pair, dealer.position())
        except BaseException as error:  # whatever it is, it is the caller's of next()
            item = error
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                break
        if isinstance(item, BaseException):
            return


def _stop(thread: threading.Thread, ready: "queue.Queue[Any]", stop: threading.Event) -> None:
    """Stop the thread and wait for it; also called when the loader is collected and when the interpreter exits."""
    stop.set()
    with contextlib.suppress(queue.Empty):
        while True:
            ready.get_nowait()
    if thread is not threading.current_thread():
        thread.join()


def tokenizing_distributed_data_loader(
    B: int,
    T: int,
    split: str,
    tokenizer_threads: int = 4,
    tokenizer_batch_size: int = 128,
    *,
    dataset: TextSource | None = None,
    tokenizer: Tokenizer | None = None,
    device: torch.device | str | None = None,
    seed: int = 42,
) -> Loader:
    """Micro-batches (inputs, targets), int64 (B, T), of this rank: endless for "train", one pass for "val".

    Args:
        B: rows in a micro-batch.
        T: tokens in a row.
        split: "train" or "val".
        tokenizer_threads: threads that tokenize.
        tokenizer_batch_size: documents tokenized at a time.
        dataset: the built-in corpus if None.
        tokenizer: the one in the base directory if None.
        device: this rank's CUDA device, or the CPU, if None.
        seed: of the order of row groups.
    """
    _, rank, local_rank, world_size = get_dist_info()
    if device is None:
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if dataset is None:
        from vibechat.dataset import open_dataset

        dataset = open_dataset()
    if tokenizer is None:
        from vibechat.tokenizer import get_tokenizer

        tokenizer = get_tokenizer()
    return Loader(
        dataset,
        tokenizer,
        B,
        T,
        split,
        rank=rank,
        world_size=world_size,
        seed=seed,
        device=device,
        tokenizer_threads=tokenizer_threads,
        tokenizer_batch_size=tokenizer_batch_size,
    )
