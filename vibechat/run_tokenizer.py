"""The tokenizer that a run of base training uses: the one of the base directory, or one that is trained first."""

from pathlib import Path

from vibechat.common import UserError, get_base_dir, print0
from vibechat.dataset import Dataset
from vibechat.tokenizer import RustBPETokenizer, get_tokenizer, train_tokenizer


def find_tokenizer(vocab_size: int | None) -> RustBPETokenizer | None:
    """The tokenizer of the base directory, if there is one.

    Raises UserError if it is of another size than `vocab_size`, or damaged.
    """
    directory = Path(get_base_dir()) / "tokenizer"
    if not (directory.is_dir() and any(directory.iterdir())):
        return None
    tokenizer = get_tokenizer()
    size = tokenizer.get_vocab_size()
    if vocab_size not in (None, size):
        raise UserError(
            f"--vocab-size {vocab_size}: the tokenizer in {directory} has {size} tokens; leave the flag out, "
            "or remove that directory to train another"
        )
    return tokenizer


def tokenizer_characters(vocab_size: int) -> int:
    """How much text a tokenizer of that size is trained on."""
    return 2_000_000_000 if vocab_size > 16_384 else 200_000_000


def first_tokenizer(vocab_size: int, dataset: Dataset) -> RustBPETokenizer:
    """A tokenizer for `dataset`, saved in the base directory."""
    directory = Path(get_base_dir()) / "tokenizer"
    print0(f"no tokenizer in {directory}: training one of {vocab_size:,} tokens on {dataset.name} first")
    texts = dataset.iter_texts("train", max_chars=tokenizer_characters(vocab_size))
    return train_tokenizer(texts, vocab_size, directory)
