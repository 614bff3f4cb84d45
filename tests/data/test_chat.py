"""Templates give the ids that DeepSeek's would, text never becomes control, and a bad line is named before training."""

import json

import pytest

from moe.config import UserError
from moe.data import chat
from moe.data.chat import Conversation, Message, chat_prompt, read_conversations
from moe.data.tokenizer import CONTROL, Tokenizer


@pytest.fixture
def written(tmp_path):
    """written(line, ...): a .jsonl file of these; bytes stay, other values become JSON."""

    def write(*lines, name="samples.jsonl"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return str(file)

    return write


def said(*messages):
    return Conversation(tuple(Message(*m) for m in messages), "here, line 1")


def dialogue(rng, words, turns):
    return [m for _ in range(turns) for m in (("user", words(rng.randint(1, 2))), ("assistant", words(1)))]


def as_json(messages):
    return {"messages": [{"role": r, "content": t} for r, t in messages]}


GOOD = {"prompt": "1+1", "response": "2"}


# ------------------------------------------------------------------------------------------------------------ templates


def test_the_chat_template_is_deepseeks(tokenizer, words, rng):
    """Against the published string, read with control tokens on."""
    messages = [("system", words(1)), *dialogue(rng, words, 3)]
    text = "<｜begin▁of▁sentence｜>"
    for role, content in messages:
        text += {"system": "", "user": "<｜User｜>", "assistant": "<｜Assistant｜>"}[role] + content
        text += "<｜end▁of▁sentence｜>" if role == "assistant" else ""
    sample = chat.chat(said(*messages), tokenizer)
    assert sample.ids == tokenizer.encode(text, allow_special=True)


def test_every_assistant_text_with_its_eos_is_an_answer_and_nothing_else(tokenizer, words, rng):
    messages = [("system", words(1)), *dialogue(rng, words, 3)]
    ids, answer = chat.chat(said(*messages), tokenizer)
    assert len(ids) == len(answer)
    answers = tokenizer.decode([i for i, is_answer in zip(ids, answer) if is_answer])
    assert answers == "".join(t + "<｜end▁of▁sentence｜>" for r, t in messages if r == "assistant")
    assert not answer[ids.index(tokenizer.id("<｜Assistant｜>"))], "the mark is given, not said"


def test_the_plain_template_is_prompt_and_response(tokenizer, words):
    prompt, response = words(2), words(1)
    ids, answer = chat.plain(said(("user", prompt), ("assistant", response)), tokenizer)
    first, second = tokenizer.encode(prompt), tokenizer.encode(response)
    assert ids == [tokenizer.bos, *first, *second, tokenizer.eos]
    assert answer == [False] * (1 + len(first)) + [True] * (len(second) + 1)


def test_a_tokenizer_without_bos_begins_with_the_text(tokenizer, words, monkeypatch):
    monkeypatch.setattr(tokenizer, "bos", None)
    messages = ("user", words(1)), ("assistant", words(1))
    assert chat.plain(said(*messages), tokenizer).ids[0] == tokenizer.encode(messages[0][1])[0]
    assert chat.chat(said(*messages), tokenizer).ids[0] == tokenizer.id("<｜User｜>")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_control_tokens_in_messages_stay_letters(tokenizer, template):
    hostile = "".join(CONTROL[:12])
    ids, answer = chat.TEMPLATES[template](said(("user", hostile), ("assistant", hostile)), tokenizer)
    control = [i for i in ids if i < 64]
    roles = [tokenizer.id("<｜User｜>"), tokenizer.id("<｜Assistant｜>")] if template == "chat" else []
    assert control == [tokenizer.bos, *roles, tokenizer.eos]
    assert answer[-1] and tokenizer.decode(ids).count(hostile) == 2


def test_a_prompt_to_answer_is_the_sample_up_to_the_answer(tokenizer, words, rng):
    messages = [("system", words(1)), *dialogue(rng, words, 2)]
    ids, answer = chat.chat(said(*messages), tokenizer)
    prompt = chat_prompt(messages[:-1], tokenizer)
    assert prompt == ids[: len(prompt)] and all(answer[len(prompt) :]) and not answer[len(prompt) - 1]


def test_a_tokenizer_without_roles_is_told_the_way_out():
    letters = Tokenizer.characters("0123456789+")
    turn = said(("user", "1+1"), ("assistant", "2"))
    for make in (lambda: chat.chat(turn, letters), lambda: chat_prompt([("user", "1")], letters)):
        with pytest.raises(UserError, match=r"needs the tokens <｜User｜> .*use sft.template=plain"):
            make()
    assert chat.plain(turn, letters).ids == [0, *letters.encode("1+12"), 1]


@pytest.mark.parametrize("roles", [("assistant",), ("system", "user", "assistant"), ("user", "assistant") * 2])
def test_the_plain_template_takes_one_question_and_one_answer(tokenizer, roles):
    with pytest.raises(UserError, match=rf"here, line 1: sft.template=plain .* not {', '.join(roles)}; use .*=chat"):
        chat.plain(said(*((r, "text") for r in roles)), tokenizer)


# -------------------------------------------------------------------------------------------------------------- reading


def test_both_forms_of_a_line_are_read_in_order(written, words, rng):
    messages = [("system", words(1)), *dialogue(rng, words, 2)]
    path = written(GOOD, b"", {**as_json(messages), "id": 7}, b"   ", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    found = read_conversations(path)
    assert [c.messages for c in found] == [(("user", "1+1"), ("assistant", "2")), tuple(messages), found[0].messages]
    assert [c.where for c in found] == [f"{path}, line {n}" for n in (1, 3, 5)]
    assert found[0].hash == found[2].hash != found[1].hash and len(found[0].hash) == 64


def test_a_folder_is_read_in_the_order_of_its_paths(written, tmp_path):
    for name in ("b.jsonl", "a/z.NDJSON", "a/.hidden.jsonl", ".git/c.jsonl", "notes.txt"):
        written({"prompt": name, "response": "x"}, name=name)
    assert [c.messages[0].text for c in read_conversations(str(tmp_path))] == ["a/z.NDJSON", "b.jsonl"]


def both(role, content):
    return {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": content}]}


@pytest.mark.parametrize("line, message", [
    (b"{", "is not valid JSON"), (b"[" * 100_000, "is not valid JSON"), (b"\xff{}", "is not UTF-8"),
    (b"3", 'has neither "messages" nor "prompt"'), ({"text": "a"}, 'has neither "messages" nor "prompt"'),
    ({"prompt": "a"}, '"response" is missing'), ({"response": "a"}, '"prompt" is missing'),
    ({"prompt": "a", "response": None}, '"response" is missing'), ({"prompt": 3, "response": "b"}, '"prompt" is not a'),
    ({"prompt": "a", "response": " \n"}, '"response" is empty'), ({"prompt": "", "response": "a"}, '"prompt" is empty'),
    ({"messages": "a"}, '"messages" is not a list'), ({"messages": ["a"]}, '"messages" is not a list'),
    ({"messages": []}, "has no message of the role assistant"), (both("user", "b"), "has no message of the role assist"),
    (both("tool", "b"), "role 'tool' of message 2 is not one of system, user, assistant"),
    (both(None, "b"), "role None of message 2"), (both(["user"], "b"), "role .'user'. of message 2"),
    (both("system", "b"), "message 2 is the system's"), (both("assistant", ""), '"content" of message 2 is empty'),
    (both("assistant", ["b"]), '"content" of message 2 is not a string'),
    (both("assistant", "\ud800"), '"content" of message 2 is not valid unicode'),
])  # fmt: skip
def test_an_invalid_line_is_an_error_that_names_file_line_and_fault(written, line, message):
    path = written(GOOD, b"", line, GOOD)
    with pytest.raises(UserError, match=rf"data.path: .*samples.jsonl, line 3: {message}.*; ") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)


def test_a_path_without_samples_is_named(written, tmp_path):
    written(b"", b" ")
    (tmp_path / "empty").mkdir()
    for path, message in (("none", "does not exist"), ("empty", "has no .jsonl file"), ("samples.jsonl", "no samples")):
        with pytest.raises(UserError, match=f"data.path=.*{path} .*{message}"):
            read_conversations(str(tmp_path / path))
