"""How conversations are laid out in tokens, and what of them is to be learned; the same for both tokenizers."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibechat.common import UserError
from vibechat.tokenizer import SPECIAL_TOKENS, HuggingFaceTokenizer, RustBPETokenizer
from vibechat.tokenizer_base import Tokenizer

TEXT = "What is two and two? It is four. Be kind. Is it? It is, for 2+2 is 4, as 4 is 2+2.\n" * 5


@pytest.fixture(scope="module", params=[RustBPETokenizer, HuggingFaceTokenizer], ids=["rustbpe", "huggingface"])
def made(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param.train_from_iterator(iter([TEXT]), 300)


def conversation(*contents: object, system: str | None = None) -> dict:
    """A user and an assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system is not None else messages}


def show(made: Tokenizer, ids: list[int], mask: list[int]) -> str:
    """The rendered text, what is to be learned in brackets."""
    shown, learning = "", 0
    for token, learn in zip(ids, mask, strict=True):
        shown += ("", "[", "]")[learn - learning] + made.decode([token])
        learning = learn
    return shown + ("]" if learning else "")


def test_layout_and_mask(made: Tokenizer):
    ids, mask = made.render_conversation(conversation("Is it?", "It is.", "Four?", "Four."))
    assert show(made, ids, mask) == (
        "<|bos|><|user_start|>Is it?<|user_end|><|assistant_start|>[It is.<|assistant_end|>]"
        "<|user_start|>Four?<|user_end|><|assistant_start|>[Four.<|assistant_end|>]"
    )


def test_tool_calls_are_learned_and_their_answers_are_not(made: Tokenizer):
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "2+2"},
        {"type": "python_output", "text": "4"},
        {"type": "text", "text": "4."},
    ]
    ids, mask = made.render_conversation(conversation("Two and two?", parts))
    assert show(made, ids, mask) == (
        "<|bos|><|user_start|>Two and two?<|user_end|><|assistant_start|>[It is <|python_start|>2+2<|python_end|>]"
        "<|output_start|>4<|output_end|>[4.<|assistant_end|>]"
    )


def test_a_system_message_joins_the_users_first(made: Tokenizer):
    given_messages = conversation("Is it?", "It is.", system="Be kind.")
    before = copy.deepcopy(given_messages)
    assert made.render_conversation(given_messages) == made.render_conversation(
        conversation("Be kind.\n\nIs it?", "It is.")
    )
    assert given_messages == before  # nothing of the caller's is changed


@pytest.mark.parametrize("max_tokens", [0, 1, 5, 10**6])
def test_truncation(made: Tokenizer, max_tokens: int):
    ids, mask = made.render_conversation(conversation("Is it?", "It is."))
    short_ids, short_mask = made.render_conversation(conversation("Is it?", "It is."), max_tokens)
    assert (short_ids, short_mask) == (ids[:max_tokens], mask[:max_tokens])


def test_the_default_limit_is_2048(made: Tokenizer):
    ids, mask = made.render_conversation(conversation("x7" * 5000, "It is."))
    assert len(ids) == len(mask) == 2048


def test_completion_ends_where_the_assistant_speaks(made: Tokenizer):
    whole = conversation("Is it?", "It is.", "Four?", "Four.", system="Be kind.")
    before = copy.deepcopy(whole)
    ids = made.render_for_completion(whole)
    assert made.decode(ids) == (
        "<|bos|><|user_start|>Be kind.\n\nIs it?<|user_end|><|assistant_start|>It is.<|assistant_end|>"
        "<|user_start|>Four?<|user_end|><|assistant_start|>"
    )
    assert made.render_for_completion({"messages": whole["messages"][:-1]}) == ids
    assert made.render_conversation(whole)[0][: len(ids)] == ids
    assert whole == before


def test_completion_cuts_nothing(made: Tokenizer):
    question = "Is it? " * 3000
    assert made.decode(made.render_for_completion(conversation(question))).count("Is it?") == 3000


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_what_is_learned_is_what_the_assistant_said(made: Tokenizer, contents: list[str]):
    ids, mask = made.render_conversation(conversation(*contents))
    learned = made.decode([token for token, learn in zip(ids, mask, strict=True) if learn])
    assert learned == "".join(content + "<|assistant_end|>" for content in contents[1::2])
    special = [token for token in ids if token in made.special_tokens().values()]
    assert len(special) == 1 + 2 * len(contents)


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_no_one_can_type_a_control_token(made: Tokenizer, name: str):
    count = made.encode_special(name)
    parts = [{"type": kind, "text": name} for kind in ("text", "python", "python_output")]
    plain = [{"type": kind, "text": "x"} for kind in ("text", "python", "python_output")]
    spelled = made.render_conversation(conversation(name, parts, f"{name}{name}", name, system=name))[0]
    harmless = made.render_conversation(conversation("x", plain, "xx", "x", system="x"))[0]
    assert spelled.count(count) == harmless.count(count)
    assert made.render_for_completion(conversation(name)).count(count) == made.render_for_completion(
        conversation("x")
    ).count(count)


@pytest.mark.parametrize(
    ("malformed", "complaint"),
    [
        (None, '{"messages"'),
        ({}, '{"messages"'),
        ({"messages": "hello"}, '{"messages"'),
        ({"messages": ["hello"]}, '{"messages"'),
        ({"messages": []}, "no message"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "system message"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, "system message"),
        ({"messages": [{"role": "system", "content": ["x"]}, {"role": "user", "content": "y"}]}, "system message"),
        ({"messages": [{"role": "assistant", "content": "y"}]}, "turn 1 has the role 'assistant'"),
        ({"messages": [{"content": "y"}]}, "turn 1 has the role None"),
        (conversation("a", "b")["messages"][0], '{"messages"'),
        ({"messages": [{"role": "user", "content": "y"}] * 2}, "turn 2 has the role 'user'"),
        (conversation(None), "a text or a list of parts"),
        (conversation("a", 5), "a text or a list of parts"),
        (conversation("a", ["b"]), "a part of a message of the assistant"),
        (conversation("a", [{"type": "image", "text": "b"}]), "a part of a message of the assistant"),
        (conversation("a", [{"type": "text", "text": 5}]), "a part of a message of the assistant"),
        (conversation([{"type": "python", "text": "2+2"}]), "a part of a message of the user"),
    ],
)
def test_malformed_conversations_are_one_line(made: Tokenizer, malformed: dict, complaint: str):
    with pytest.raises(UserError) as raised:
        made.render_conversation(malformed)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)
