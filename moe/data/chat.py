"""Conversations from .jsonl lines, and their templates: which tokens they become, and which of these are answers.

    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}     or     {"prompt": ..., "response": ...}

    chat     BOS system <｜User｜>text<｜Assistant｜>text EOS <｜User｜>...     every assistant text and its EOS is an answer
    plain    BOS prompt response EOS                                        the response and EOS are the answer

Text is never an instruction: `<｜User｜>` inside a message stays letters. An invalid line is an error that names file and
line, since a file of samples is written by hand or by a program, and half of it is not what its author meant.
Source: the chat template of DeepSeek-V3's tokenizer_config.json. Not here: tools, <think>, packing (samples.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import UserError
from moe.data.tokenizer import Tokenizer

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
ROLES = ("system", "user", "assistant")
FILES = (".jsonl", ".ndjson")


class Message(NamedTuple):
    role: str
    text: str


class Conversation(NamedTuple):
    messages: tuple[Message, ...]
    where: str
    """File and line, for messages."""

    @property
    def hash(self) -> str:
        """Hexadecimal digits, the same for the same messages anywhere."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()


class Sample(NamedTuple):
    ids: list[int]
    answer: list[bool]
    """Tokens whose prediction is trained, EOS included."""


# -------------------------------------------------------------------------------------------------------------- reading


def read_conversations(path: str) -> list[Conversation]:
    """Every line of a .jsonl file, or of all such files in a folder, in the order of their paths; blank lines do not
    count."""
    found = [conversation for file in _files(path) for conversation in _lines(file)]
    if not found:
        raise UserError(f"data.path={path} holds no samples; put one JSON object on each line")
    return found


def _files(path: str) -> list[Path]:
    root = Path(path)
    if not root.exists():
        raise UserError(f"data.path={path} does not exist; name a .jsonl file of samples or a folder of them")
    if not root.is_dir():
        return [root]
    inside = (f for f in root.rglob("*") if f.suffix.lower() in FILES and f.is_file())
    files = [f for f in inside if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    if not files:
        raise UserError(f"data.path={path} has no .jsonl file in it; put samples there, or name a file")
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


def _lines(file: Path) -> Iterator[Conversation]:
    try:
        with open(file, "rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    try:
                        yield Conversation(_messages(line), where)
                    except _Invalid as fault:
                        raise UserError(f"data.path: {where}: {fault}") from None
    except OSError as error:
        raise UserError(f"data.path: {file} cannot be read ({error.strerror}); mend or move it") from None


class _Invalid(Exception):
    """What is wrong with a line, and the way out."""


def _messages(line: bytes) -> tuple[Message, ...]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Invalid("is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError):  # RecursionError: a line of ten thousand brackets
        raise _Invalid("is not valid JSON; write one object on each line") from None
    if not isinstance(row, dict) or not ("messages" in row or {"prompt", "response"} & row.keys()):
        raise _Invalid('has neither "messages" nor "prompt" and "response"; write {"prompt": ..., "response": ...}')
    if "messages" not in row:
        pair = (("user", "prompt"), ("assistant", "response"))
        return tuple(Message(role, _text(row.get(name), f'"{name}"')) for role, name in pair)
    listed = row["messages"]
    if not isinstance(listed, list) or not all(isinstance(m, dict) for m in listed):
        raise _Invalid('"messages" is not a list of {"role": ..., "content": ...}; write it so')
    messages = tuple(_message(m, number) for number, m in enumerate(listed, 1))
    if not any(m.role == "assistant" for m in messages):
        raise _Invalid("has no message of the role assistant, so nothing to learn; add the answer")
    return messages


def _message(given: dict[str, Any], number: int) -> Message:
    role = given.get("role")
    if role not in ROLES:
        raise _Invalid(f"role {role!r} of message {number} is not one of {', '.join(ROLES)}; rename it")
    if role == "system" and number > 1:
        raise _Invalid(f"message {number} is the system's, which comes first; move it")
    return Message(role, _text(given.get("content"), f'"content" of message {number}'))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _Invalid(f"{what} is {'missing' if value is None else 'not a string'}; add it or remove the line")
    if not value.strip():
        raise _Invalid(f"{what} is empty; add it or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
        raise _Invalid(f"{what} is not valid unicode; mend it or remove the line") from None
    return value


# ------------------------------------------------------------------------------------------------------------ templates


def chat(conversation: Conversation, tokenizer: Tokenizer) -> Sample:
    """DeepSeek's template."""
    parts = _turns(conversation.messages, tokenizer)
    return Sample([i for ids, _ in parts for i in ids], [answer for ids, answer in parts for _ in ids])


def plain(conversation: Conversation, tokenizer: Tokenizer) -> Sample:
    """Prompt and response as one text."""
    if [m.role for m in conversation.messages] != ["user", "assistant"]:
        roles = ", ".join(m.role for m in conversation.messages)
        raise UserError(
            f"data.path: {conversation.where}: sft.template=plain takes one prompt and one response, not {roles}; "
            "use sft.template=chat"
        )
    prompt, response = (tokenizer.encode(m.text) for m in conversation.messages)
    return pair(_bos(tokenizer) + prompt, [*response, tokenizer.eos])


def pair(prompt: list[int], answer: list[int]) -> Sample:
    """One question, one answer."""
    return Sample(prompt + answer, [False] * len(prompt) + [True] * len(answer))


TEMPLATES = {"chat": chat, "plain": plain}


def chat_prompt(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[int]:
    """(role, text) of each message -> ids up to where the assistant speaks next."""
    turns = [i for ids, _ in _turns(messages, tokenizer) for i in ids]
    return [*turns, _roles(tokenizer)[1]]


def _turns(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Pieces of the chat template: ids, and whether they are an answer."""
    user, assistant = _roles(tokenizer)
    turns = [(_bos(tokenizer), False)]
    for role, text in messages:
        ids = tokenizer.encode(text)
        if role == "assistant":
            turns += [([assistant], False), ([*ids, tokenizer.eos], True)]
        else:
            turns.append(([user, *ids] if role == "user" else ids, False))
    return turns


def _roles(tokenizer: Tokenizer) -> tuple[int, int]:
    user, assistant = tokenizer.id(USER), tokenizer.id(ASSISTANT)
    if user is None or assistant is None:
        raise UserError(
            f"sft.template=chat needs the tokens {USER} and {ASSISTANT}, which this tokenizer lacks; "
            "use sft.template=plain, or a tokenizer that has them"
        )
    return user, assistant


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos is None else [tokenizer.bos]
