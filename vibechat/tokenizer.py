"""Text to token ids and back: byte-pair encoding.

A tokenizer is data: a list of byte strings, of which the index is the id and the rank (a pair of adjacent tokens that
makes the token of the lowest rank is merged first), a pattern that cuts text into chunks within which merges happen,
and nine special tokens, which come last. The pattern is GPT-4's with numbers of at most two digits.

Training and encoding are done by the compiled extension `vibechat._rustbpe` (source in rustbpe/). Where it is missing,
tiktoken encodes, to the same ids, at a fraction of the speed (`python -m bench.tokenizer` says which); training is then
refused. Special tokens and conversations: see `tokenizer_base`.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from vibechat.common import UserError, get_base_dir, print0
from vibechat.tokenizer_base import SPECIAL_TOKENS, Tokenizer
from vibechat.tokenizer_files import REMEDY, ranks_as_text, read_config, read_ranks, write_files

if TYPE_CHECKING:
    import tokenizers

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
RANKS_FILE = "tokenizer.tiktoken"  # tiktoken's own format: base64 token, space, rank; a token a line
CONFIG_FILE = "tokenizer_config.json"  # pattern, special tokens, and the SHA-256 of the ranks
HUGGINGFACE_FILE = "tokenizer.json"

Progress = Callable[[str, int, int], object]
"""Called as (stage, done, total): ("reading", bytes, 0), then ("merging", tokens, vocabulary size)."""


def default_vocab_size(small: bool = False) -> int:
    """65,536 where there is a CUDA GPU, else (or where a model is meant to be small) 8,192, which it can afford."""
    return 65536 if torch.cuda.is_available() and not small else 8192


# ---------------------------------------------------------------------------------------------------------------------
# encoders


class _Encoder(Protocol):
    def encode_batch(
        self, texts: list[str], num_threads: int, prepend: int | None, append: int | None
    ) -> list[list[int]]: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


class _TiktokenEncoder:
    """tiktoken behind the interface of `_rustbpe.Encoder`: for pretrained vocabularies, which have other patterns."""

    def __init__(self, tokens: list[bytes], pattern: str, special_tokens: dict[str, int]) -> None:
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding(
            "vibechat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )

    def encode_batch(
        self, texts: list[str], num_threads: int, prepend: int | None, append: int | None
    ) -> list[list[int]]:
        if len(texts) == 1:
            encoded = [self.encoding.encode_ordinary(texts[0])]
        else:
            encoded = self.encoding.encode_ordinary_batch(texts, num_threads=num_threads or os.cpu_count() or 1)
        before, after = [[] if token is None else [token] for token in (prepend, append)]
        return [[*before, *ids, *after] for ids in encoded] if before or after else encoded

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        try:
            return self.encoding.decode_bytes(ids)
        except KeyError as error:
            raise ValueError(f"there is no token {error}: the vocabulary has {self.encoding.n_vocab}") from error


def _extension() -> ModuleType | None:
    """The compiled extension; None where it was not built."""
    try:
        from vibechat import _rustbpe
    except ImportError:
        return None
    return _rustbpe


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer


class RustBPETokenizer(Tokenizer):
    """The tokenizer that vibechat trains and uses.

    Args:
        tokens: the ordinary tokens; a token's index is its id and rank.
        special_tokens: names with ids, all of them past the ordinary ones.
        pattern: the regular expression that cuts text into chunks.
    """

    def __init__(self, tokens: list[bytes], special_tokens: dict[str, int], pattern: str = SPLIT_PATTERN) -> None:
        self.tokens = tokens
        self.pattern = pattern
        self._special_tokens = dict(special_tokens)
        self._vocab_size = max([len(tokens) - 1, *special_tokens.values()]) + 1

    @classmethod
    def train_from_iterator(
        cls, text_iterator: Iterable[str], vocab_size: int, *, num_threads: int = 0, progress: Progress | None = None
    ) -> "RustBPETokenizer":
        """Train on texts, which are taken one by one and never held together.

        The result is the same on any number of threads. If the text is so small that nothing is left to merge, the
        vocabulary is smaller than asked for.

        Args:
            vocab_size: how many ids there are to be, the 9 special ones included: 265 or more.
            num_threads: 0 for all cores.

        Raises UserError for a vocab_size that is too small, for no text, and where the extension is missing.
        """
        extension = _extension()
        if extension is None:
            raise UserError("training a tokenizer needs the compiled extension: install Rust and run `uv sync`")
        if vocab_size < 256 + len(SPECIAL_TOKENS):
            raise UserError(f"--vocab-size {vocab_size}: must be at least 265 (256 bytes and 9 special tokens)")
        try:
            tokens = extension.train(text_iterator, vocab_size - len(SPECIAL_TOKENS), num_threads, progress)
        except MemoryError as error:  # more than 4 GB of distinct chunks
            raise UserError(f"training the tokenizer: {error}") from error
        if len(tokens) == 256 < vocab_size - len(SPECIAL_TOKENS):
            raise UserError("the tokenizer got no text to learn from: look at --data and --max-chars")
        return cls(tokens, {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_directory(cls, tokenizer_dir: str) -> "RustBPETokenizer":
        """Load what `save` wrote, and verify it. Raises UserError naming the file that is missing or corrupt."""
        config = read_config(Path(tokenizer_dir) / CONFIG_FILE)
        tokens = read_ranks(Path(tokenizer_dir) / RANKS_FILE, config["ranks_sha256"])
        if min(config["special_tokens"].values(), default=len(tokens)) < len(tokens):
            raise UserError(f"{tokenizer_dir}: the special tokens of {CONFIG_FILE} do not come after {RANKS_FILE}")
        tokenizer = cls(tokens, config["special_tokens"], config["pattern"])
        if tokenizer.fingerprint() != config["fingerprint"]:
            raise UserError(f"{tokenizer_dir}/{CONFIG_FILE} is corrupt (not what its fingerprint says): {REMEDY}")
        return tokenizer

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> "RustBPETokenizer":
        """Load one of tiktoken's encodings ("gpt2", "cl100k_base"), from the network or `$TIKTOKEN_CACHE_DIR`.

        Raises UserError if tiktoken does not know or cannot get it.
        """
        import tiktoken

        try:
            encoding = tiktoken.get_encoding(tiktoken_name)
        except ValueError as error:
            raise UserError(f"tiktoken has no encoding {tiktoken_name!r}: {str(error).splitlines()[0]}") from error
        except OSError as error:  # all errors of requests are
            raise UserError(
                f"{tiktoken_name} is not on this machine and could not be downloaded ({type(error).__name__}): "
                "set TIKTOKEN_CACHE_DIR to a directory that holds it, or try again with a network"
            ) from error
        by_rank = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
        if [rank for _, rank in by_rank] != list(range(len(by_rank))):
            raise UserError(f"{tiktoken_name}: its ranks have gaps, which is not supported; use gpt2 or cl100k_base")
        return cls([token for token, _ in by_rank], encoding._special_tokens, encoding._pat_str)

    @functools.cached_property
    def _encoder(self) -> _Encoder:
        extension = _extension()
        names = sorted(self._special_tokens, key=self._special_tokens.__getitem__)
        follow = [self._special_tokens[name] for name in names] == list(range(len(self.tokens), self._vocab_size))
        if extension is not None and self.pattern == extension.PATTERN and follow:
            return extension.Encoder(self.tokens, names)
        return _TiktokenEncoder(self.tokens, self.pattern, self._special_tokens)

    def _encode_batch(
        self, texts: list[str], num_threads: int, prepend: int | None, append: int | None
    ) -> list[list[int]]:
        return self._encoder.encode_batch(texts, num_threads, prepend, append)

    def encode_arrays(self, texts: list[str], num_threads: int = 8) -> list[np.ndarray]:
        if isinstance(self._encoder, _TiktokenEncoder):
            return super().encode_arrays(texts, num_threads)
        buffers = self._encoder.encode_batch_to_buffers(texts, num_threads)  # type: ignore[attr-defined]
        return [np.frombuffer(buffer, dtype=np.int32) for buffer in buffers]

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, UTF-8 or not; `decode_bytes` gives exactly them back. Needs the extension."""
        if isinstance(self._encoder, _TiktokenEncoder):
            raise UserError("encoding bytes needs vibechat's own split pattern and the compiled extension")
        return self._encoder.encode_bytes(data)  # type: ignore[attr-defined]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoder.decode_bytes(ids)

    def get_vocab_size(self) -> int:
        return self._vocab_size

    def special_tokens(self) -> dict[str, int]:
        return self._special_tokens

    def token_bytes(self) -> torch.Tensor:
        lengths = torch.zeros(self._vocab_size, dtype=torch.int32)
        lengths[: len(self.tokens)] = torch.tensor([len(token) for token in self.tokens], dtype=torch.int32)
        return lengths

    def fingerprint(self) -> str:
        data = {
            "pattern": self.pattern,
            "special_tokens": self._special_tokens,
            "ranks_sha256": hashlib.sha256(ranks_as_text(self.tokens)).hexdigest(),
        }
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def save(self, tokenizer_dir: str) -> None:
        ranks = ranks_as_text(self.tokens)
        config = {
            "format": "vibechat-bpe",
            "version": 1,
            "vocab_size": self._vocab_size,
            "pattern": self.pattern,
            "special_tokens": self._special_tokens,
            "ranks_sha256": hashlib.sha256(ranks).hexdigest(),
            "fingerprint": self.fingerprint(),
        }
        config_text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_files(Path(tokenizer_dir), {RANKS_FILE: ranks, CONFIG_FILE: config_text.encode()})


# ---------------------------------------------------------------------------------------------------------------------
# the alternative


class HuggingFaceTokenizer(Tokenizer):
    """The same interface over the `tokenizers` library, for vocabularies that come as a `tokenizer.json`."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True  # "<|bos|>" in a text is a text
        self._special_tokens = {
            token.content: i for i, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special
        }

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int) -> "HuggingFaceTokenizer":
        """Train with the library's own trainer. `vocab_size` counts the 9 special tokens, which come last."""
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Library

        if vocab_size < 256 + len(SPECIAL_TOKENS):
            raise UserError(f"--vocab-size {vocab_size}: must be at least 265 (256 bytes and 9 special tokens)")
        tokenizer = Library(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(text_iterator, trainer)
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
        return cls(tokenizer)

    @classmethod
    def from_directory(cls, tokenizer_dir: str) -> "HuggingFaceTokenizer":
        """Load `tokenizer.json` from a directory. Raises UserError if it is missing or malformed."""
        return cls._from_file(Path(tokenizer_dir) / HUGGINGFACE_FILE)

    @classmethod
    def from_pretrained(cls, hf_path: str) -> "HuggingFaceTokenizer":
        """Load `tokenizer.json` of a repository on the hub, such as "gpt2". Raises UserError if it cannot be had."""
        from huggingface_hub import hf_hub_download

        try:
            return cls._from_file(Path(hf_hub_download(hf_path, HUGGINGFACE_FILE)))
        except (OSError, ValueError) as error:  # errors of the network, of the hub, of the name
            raise UserError(f"{hf_path}: no {HUGGINGFACE_FILE} from the hub: {str(error).splitlines()[0]}") from error

    @classmethod
    def _from_file(cls, path: Path) -> "HuggingFaceTokenizer":
        from tokenizers import Tokenizer as Library

        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        try:
            return cls(Library.from_file(str(path)))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer of Hugging Face: {error}") from error

    def _encode_batch(
        self, texts: list[str], num_threads: int, prepend: int | None, append: int | None
    ) -> list[list[int]]:
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        if num_threads == 1:
            encodings = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        else:  # as many threads as the library takes, which is $RAYON_NUM_THREADS or all cores
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        before, after = [[] if token is None else [token] for token in (prepend, append)]
        return [[*before, *encoding.ids, *after] for encoding in encodings]

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        """The bytes of each token: the library writes every byte as a printable character."""
        added = self.tokenizer.get_added_tokens_decoder()
        byte_of = _byte_level_alphabet()
        return {
            i: token.encode() if i in added else bytes(byte_of[character] for character in token)
            for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items()
        }

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        try:
            return b"".join([self._token_bytes[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"there is no token {error}: the vocabulary has {self.get_vocab_size()}") from error

    def get_vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def special_tokens(self) -> dict[str, int]:
        return self._special_tokens

    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def save(self, tokenizer_dir: str) -> None:
        write_files(Path(tokenizer_dir), {HUGGINGFACE_FILE: self.tokenizer.to_str(pretty=True).encode()})


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of GPT-2's printable alphabet stands for.

    Printable bytes of Latin-1 stand for themselves; the other 68 are, in their order, the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer of this machine


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    directory: str | Path,
    *,
    num_threads: int = 0,
    progress: Progress | None = None,
) -> RustBPETokenizer:
    """Train on texts and save to a directory; says so in a line where the vocabulary became smaller than asked for."""
    tokenizer = RustBPETokenizer.train_from_iterator(texts, vocab_size, num_threads=num_threads, progress=progress)
    if tokenizer.get_vocab_size() < vocab_size:
        print0(
            f"note: the text has pairs for a vocabulary of {tokenizer.get_vocab_size():,}, not {vocab_size:,}: "
            "every word in it is a token now; more text, or a smaller --vocab-size, would generalize better"
        )
    tokenizer.save(str(directory))
    return tokenizer


def get_tokenizer(*, directory: str | None = None) -> RustBPETokenizer:
    """The tokenizer of a directory, by default of `<base directory>/tokenizer`. Raises UserError if there is none."""
    return RustBPETokenizer.from_directory(directory or str(Path(get_base_dir()) / "tokenizer"))


def get_token_bytes(device: str | torch.device = "cpu", *, directory: str | None = None) -> torch.Tensor:
    """The length in bytes of each token of `get_tokenizer`, int32 (vocab,) on `device`; 0 for special tokens."""
    return get_tokenizer(directory=directory).token_bytes().to(device)
