"""The compiled part of the tokenizer, from the crate in rustbpe/."""

from collections.abc import Callable, Iterable, Sequence

PATTERN: str
"""The split pattern that the crate implements."""

def train(
    texts: Iterable[str],
    vocab_size: int,
    num_threads: int = 0,
    progress: Callable[[str, int, int], object] | None = None,
) -> list[bytes]:
    """Learn byte-pair merges; return the tokens in order of rank, the 256 bytes first.

    Args:
        texts: taken one by one and forgotten once counted.
        vocab_size: of what is returned (special tokens are no business of training), 256 to 2^31. Fewer tokens come
            back if the texts are so small that nothing is left to merge.
        num_threads: 0 for all cores. The result does not depend on it.
        progress: called about ten times a second: ("reading", bytes so far, 0), then ("merging", tokens, vocab_size).

    Raises:
        ValueError: for a vocab_size out of range.
        MemoryError: for more than 4 GB of distinct chunks.
        TypeError: for a text that is no str. What the iterable or `progress` raises, passes through.
    """

def split(text: str) -> list[str]:
    """The chunks of a text, within which merges happen."""

class Encoder:
    """Text to ids and back. Ids are ranks; special tokens take the ids after them and are only decoded."""

    def __init__(self, tokens: Sequence[bytes], special_tokens: Sequence[str] = ()) -> None:
        """Raises ValueError for an empty token, one that stands twice, and a byte that is no token."""
    @property
    def vocab_size(self) -> int:
        """How many ids there are, special ones included."""
    def encode(self, text: str) -> list[int]:
        """The ids of a text. Lone surrogates count as U+FFFD."""
    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes; where they are UTF-8, those of the text."""
    def encode_batch(
        self,
        texts: Sequence[str],
        num_threads: int = 0,
        prepend: int | None = None,
        append: int | None = None,
    ) -> list[list[int]]:
        """The ids of each text between `prepend` and `append`, without the GIL on `num_threads` threads (0: all)."""
    def encode_batch_to_buffers(self, texts: Sequence[str], num_threads: int = 0) -> list[bytes]:
        """The ids of each text as 32-bit integers in the machine's byte order; no Python int is made."""
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that ids stand for. Raises ValueError for an id that there is not."""
