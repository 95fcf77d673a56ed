"""A tokenizer's data files: written whole or not at all, verified when read.

Ranks are in tiktoken's own format: a token a line, as base64, a space and its rank. A JSON file beside them holds the
rest, the SHA-256 of the ranks and a fingerprint of the whole, so that a damaged file is refused by name.
"""

import base64
import binascii
import hashlib
import json
import os
import tempfile
from pathlib import Path

from vibechat.common import UserError

REMEDY = "restore it from a copy, or train again with `vibechat tok-train`"


def ranks_as_text(tokens: list[bytes]) -> bytes:
    """The rank file of tokens, whose ranks are their indices."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def read_ranks(path: Path, sha256: str) -> list[bytes]:
    """The tokens of a rank file in order of rank.

    Raises UserError if it is missing or not the file with this SHA-256, and if its ranks are not 0, 1, 2, ..., a token
    stands twice, or one of the 256 bytes is no token.
    """
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is corrupt (its SHA-256 is not the recorded one): {REMEDY}")
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines()):
        try:
            token, rank = line.split(b" ")
            tokens.append(base64.b64decode(token, validate=True))
            if int(rank) != number:
                raise ValueError("ranks are not 0, 1, 2, ...")
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path}, line {number + 1}: {error}: {REMEDY}") from error
    if len(set(tokens)) != len(tokens) or not set(tokens) >= {bytes([byte]) for byte in range(256)}:
        raise UserError(f"{path}: a token stands twice, or one of the 256 bytes is missing: {REMEDY}")
    return tokens


def read_config(path: Path) -> dict:
    """The JSON beside the ranks. Raises UserError if it is missing, malformed, or of a later version."""
    if not path.exists():
        raise UserError(f"there is no tokenizer in {path.parent}: train one with `vibechat tok-train`")
    data = _read(path)
    try:
        config = json.loads(data)
        fields = {"pattern": str, "special_tokens": dict, "ranks_sha256": str, "fingerprint": str, "version": int}
        for field, kind in fields.items():
            if not isinstance(config[field], kind):
                raise TypeError(f"{field} is no {kind.__name__}")
        if not all(type(token) is int for token in config["special_tokens"].values()):
            raise TypeError("an id in special_tokens is no int")
        if len(set(config["special_tokens"].values())) != len(config["special_tokens"]):
            raise ValueError("two special tokens have the same id")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupt ({error!r}): {REMEDY}") from error
    if config["version"] != 1:
        raise UserError(f"{path} has version {config['version']}, but this vibechat reads only version 1: update it")
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: {REMEDY}") from error


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Write files into a directory, flushed to disk before they get their names.

    A directory that does not exist yet appears at once with all files in it. In one that exists the files are replaced
    one by one, in the order given: a kill in between leaves a mixture, which the SHA-256 in the last one betrays.
    Raises UserError if that fails; then no temporary file is left.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
            fresh = Path(temporary) / directory.name
            fresh.mkdir()
            for name, data in files.items():
                with (fresh / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            if directory.exists():
                for name in files:
                    (fresh / name).replace(directory / name)
            else:
                fresh.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write the tokenizer to {directory}: {error.strerror}") from error
