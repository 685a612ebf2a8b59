"""From a line of a file to a text that a reward model scores: a string, or a conversation.

Knows no tokenizer and no file: `hf/texts.py` makes tokens, the `score` command reads lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..hf.texts import Text, joined

FORMS = "`text`, `prompt` and `response`, or `messages`"


def text_of_line(line: bytes | str, *, plain: bool = False, as_messages: bool = False) -> Text:
    """The text in a line.

    Args:
        line: JSON, or under `plain` the text itself; its line break is no part of it.
        plain: take the line as it is.
        as_messages: make a user's and an assistant's message of `prompt` and `response` that are strings, so that the
            tokenizer's chat template applies. Otherwise the response stands directly behind the prompt, as TRL's
            RewardTrainer puts them.

    Raises:
        ValueError: it is not UTF-8, no JSON object, or has none of the known columns; says why.
    """
    try:
        decoded = line.decode("utf-8") if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    if plain:
        text = decoded.rstrip("\r\n")
        if not text.strip():
            raise ValueError("an empty line, which is no text")
        return text
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with {FORMS}, got {_named(row)}")
    return text_of_row(row, as_messages=as_messages)


def text_of_row(row: Mapping[str, Any], *, as_messages: bool = False) -> Text:
    """The text of a row with `text`, `prompt` and `response` (or `completion`), or `messages`.

    Raises:
        ValueError: none of these, or one that is neither text nor messages.
    """
    held = {key for key, value in row.items() if value is not None}
    answers = [name for name in ("response", "completion") if name in held]
    forms = [("text" in held, "`text`"), ("messages" in held, "`messages`"), ("prompt" in held, "`prompt`")]
    given = [name for there, name in forms if there]
    if len(given) != 1 or (given == ["`prompt`"]) != bool(answers):
        names = ", ".join(sorted(map(str, held))[:12]) or "nothing"
        raise ValueError(f"must have {FORMS}, and one of them alone, got {names}")
    if "text" in held:
        return _string(row["text"], "text")
    if "messages" in held:
        return messages_of(row["messages"], "messages")
    prompt, response = row["prompt"], row[answers[0]]
    if isinstance(prompt, str) and isinstance(response, str):
        if not as_messages:
            return _string(prompt + response, "prompt and response")
        prompt = [{"role": "user", "content": prompt}]
    before = messages_of(prompt, "prompt")
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    return joined(before, messages_of(response, "response"))


def messages_of(value: Any, part: str) -> list[dict[str, Any]]:
    """Checked messages, each with a role and a text.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{part} must be a list of messages, got {_named(value)}")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message of {part} must have a role, got {message!r:.60}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"a message of {part} must have a content of text, got {message.get('content')!r:.60}")
    return [dict(message) for message in value]


def flattened(text: Text) -> str:
    """A conversation's texts with an empty line between them, for a tokenizer without a chat template."""
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)


def _string(value: Any, part: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{part} must be text, got {_named(value)}")
    if not value.strip():
        raise ValueError(f"{part} is empty")
    return value


def _named(value: Any) -> str:
    kinds = {dict: "an object", list: "an empty list" if value == [] else "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), f"{value!r:.40}")
