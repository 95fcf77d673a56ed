"""What every tokenizer does alike: special tokens, and how a conversation is laid out in tokens.

Text never becomes a control token: `encode` treats "<|bos|>" as seven ordinary characters. Special tokens come only
from `encode_special`, `prepend`, `append` and the rendering of conversations.

A conversation is `{"messages": [{"role": ..., "content": ...}, ...]}`: an optional system message, then user and
assistant in turn. A content is a text; an assistant's may also be a list of parts, `{"type": ..., "text": ...}`, of
type text, python (an expression for the calculator) and python_output (the calculator's answer). It becomes

    <|bos|> <|user_start|> ... <|user_end|> <|assistant_start|> ... <|assistant_end|> <|user_start|> ...

with <|python_start|> ... <|python_end|> around a tool call and <|output_start|> ... <|output_end|> around its answer.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

import numpy as np
import torch

from vibechat.common import UserError

SPECIAL_TOKENS = [
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator ...
    "<|python_end|>",
    "<|output_start|>",  # ... which answers
    "<|output_end|>",
]


class Tokenizer(ABC):
    """What a model, a loader or a server may ask of a tokenizer."""

    @abstractmethod
    def _encode_batch(
        self, texts: list[str], num_threads: int, prepend: int | None, append: int | None
    ) -> list[list[int]]:
        """The ids of each text between `prepend` and `append`."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes that ids stand for, special tokens by name. Raises ValueError for an id that there is not."""

    @abstractmethod
    def get_vocab_size(self) -> int:
        """How many ids there are, special tokens included."""

    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """The special tokens with their ids."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 in hex over all that decides about ids: equal for tokenizers that encode and decode alike."""

    @abstractmethod
    def save(self, tokenizer_dir: str) -> None:
        """Write the data files into a directory, which is made if it is missing. Raises UserError if that fails."""

    @overload
    def encode(
        self, text: str, prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[int]: ...

    @overload
    def encode(
        self, text: list[str], prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """The ids of a text, or of each text of a list.

        Args:
            text: any str; lone surrogates, which no UTF-8 can hold, count as U+FFFD.
            prepend: an id, or the name of a special token, to stand before each text.
            append: the same, after each text.
            num_threads: for a list: how many threads encode it (0: all cores), without holding Python's lock.
        """
        around = [self.encode_special(token) if isinstance(token, str) else token for token in (prepend, append)]
        if isinstance(text, str):
            return self._encode_batch([text], 1, *around)[0]
        return self._encode_batch(text, num_threads, *around)

    def encode_arrays(self, texts: list[str], num_threads: int = 8) -> list[np.ndarray]:
        """The ids of each text as an int32 array, which may be read-only: `encode` for the loader, which packs them."""
        return [np.asarray(ids, dtype=np.int32) for ids in self._encode_batch(texts, num_threads, None, None)]

    def decode(self, ids: list[int]) -> str:
        """The text that ids stand for; bytes that are not UTF-8, as when a character is cut, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_special(self, text: str) -> int:
        """The id of a special token by its exact name. Raises ValueError if there is none of that name."""
        special = self.special_tokens()
        if text not in special:
            raise ValueError(f"no special token {text!r}; there are {', '.join(special)}")
        return special[text]

    def get_bos_token_id(self) -> int:
        """The id of the token that begins every document: <|bos|>, or GPT-2's <|endoftext|>."""
        special = self.special_tokens()
        return special["<|bos|>"] if "<|bos|>" in special else self.encode_special("<|endoftext|>")

    def token_bytes(self) -> torch.Tensor:
        """The length in bytes of each token, int32 (vocab,); 0 for special tokens, which stand for no text."""
        special = set(self.special_tokens().values())
        lengths = [0 if i in special else len(self.decode_bytes([i])) for i in range(self.get_vocab_size())]
        return torch.tensor(lengths, dtype=torch.int32)

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Lay a conversation out in tokens, to train on.

        Returns (ids, mask), cut to `max_tokens`; mask is 1 where the assistant is to learn to say the token: its text,
        its tool calls and its end, but neither the tool's answers nor anything of the user. Raises UserError for a
        conversation that is malformed.
        """
        ids: list[int] = [self.get_bos_token_id()]
        mask: list[int] = [0]

        def say(tokens: int | list[int], learn: int) -> None:
            tokens = [tokens] if isinstance(tokens, int) else tokens
            ids.extend(tokens)
            mask.extend([learn] * len(tokens))

        for message in _alternating_messages(conversation):
            role, special = message["role"], functools.partial(self._special_of, message["role"])
            say(special("start"), 0)
            for kind, text in _parts_of(message):
                tokens = self._encode_batch([text], 1, None, None)[0]
                if kind == "text":
                    say(tokens, int(role == "assistant"))
                else:
                    name, learn = ("python", 1) if kind == "python" else ("output", 0)
                    say(self._special_of(name, "start"), learn)
                    say(tokens, learn)
                    say(self._special_of(name, "end"), learn)
            say(special("end"), int(role == "assistant"))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """The ids of a conversation, its last answer left out, ending where the assistant is to speak.

        Nothing is cut: how much context there is room for, is the caller's to decide.
        """
        messages = _messages_of(conversation)
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        ids, _ = self.render_conversation({**conversation, "messages": messages}, max_tokens=2**62)
        return [*ids, self.encode_special("<|assistant_start|>")]

    def _special_of(self, name: str, end: str) -> int:
        return self.encode_special(f"<|{name}_{end}|>")


# ---------------------------------------------------------------------------------------------------------------------
# the form of a conversation, checked


def _messages_of(conversation: dict) -> list[dict]:
    """The messages of a conversation, as they stand. Raises UserError if it has no list of them."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError('a conversation must be {"messages": [{"role": ..., "content": ...}, ...]}')
    return messages


def _alternating_messages(conversation: dict) -> list[dict]:
    """The messages, a leading system message joined to the user's first; user and assistant alternate from there."""
    messages = _messages_of(conversation)
    if messages and messages[0].get("role") == "system":
        contents = [message.get("content") for message in messages[:2]]
        if len(messages) < 2 or messages[1].get("role") != "user" or not all(isinstance(c, str) for c in contents):
            raise UserError("a conversation's system message must be a text that a user's text follows")
        messages = [{"role": "user", "content": f"{contents[0]}\n\n{contents[1]}"}, *messages[2:]]
    if not messages:
        raise UserError("a conversation has no message from a user")
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message.get("role") != expected:
            raise UserError(
                f"a conversation's turn {index + 1} has the role {message.get('role')!r} where {expected!r} must speak"
            )
    return messages


def _parts_of(message: dict) -> list[tuple[str, str]]:
    """A message's content as (kind, text), kind being text, python (a tool call) or python_output (its answer)."""
    role, content = message["role"], message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    kinds = ("text",) if role == "user" else ("text", "python", "python_output")
    if not isinstance(parts, list):
        raise UserError(f"the content of a message of the {role} must be a text or a list of parts")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise UserError(
                f'a part of a message of the {role} must be {{"type": {" or ".join(kinds)}, "text": ...}}, not {part!r}'
            )
    return [(part["type"], part["text"]) for part in parts]
