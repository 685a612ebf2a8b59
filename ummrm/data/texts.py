"""What stands in a row as text or as a conversation, read alike for training, evaluation and scoring.

A conversation is a list of messages with role and content. What is none raises `RowProblem`, which says why; which
columns there are is the business of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rows import RowProblem, named

Text = str | list[dict[str, str]]
ROLES = ("system", "developer", "user", "assistant", "tool")


def text_or_messages(value: Any, part: str) -> Text:
    """A value that is text, or a list of messages, which may be empty; `part` is what the error calls it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise RowProblem("malformed", f"{part} must be text or a list of messages, got {value!r:.40}")
    return [_message(one, part) for one in value]


def messages_of(value: Any, part: str) -> list[dict[str, str]]:
    """A value that is a list of messages, at least one."""
    if not isinstance(value, (list, tuple)) or not value:
        raise RowProblem("malformed", f"{part} must be a list of messages, got {named(value)}")
    return [_message(one, part) for one in value]


def text_of(value: Any, part: str) -> str:
    """A value that is text, and not empty."""
    if not isinstance(value, str):
        raise RowProblem("malformed", f"{part} must be text, got {named(value)}")
    if not value.strip():
        raise RowProblem("empty", f"{part} is empty")
    return value


def whole_text(prompt: Any, answer: Any, *, turns: tuple[str, str] | None = None, as_messages: bool = False) -> Text:
    """A prompt and an answer as the one text that a reward model scores.

    Args:
        prompt: text or messages.
        answer: text or messages; messages behind a prompt of text make that a user's.
        turns: as in `PairSource`: two texts are a dialogue that is cut into messages.
        as_messages: as in `PairSource`: two texts are a user's and an assistant's message. Otherwise the answer stands
            directly behind the prompt.

    Raises:
        RowProblem: one of them is neither, or both are empty text.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        if turns is not None:
            return turns_of(prompt + answer, turns, "prompt and response")
        if not as_messages:
            return text_of(prompt + answer, "prompt and response")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_of(prompt, "prompt")
    if isinstance(answer, str):
        return [*before, {"role": "assistant", "content": answer}]
    return before + messages_of(answer, "response")


def turns_of(text: Any, marks: tuple[str, str], part: str) -> list[dict[str, str]]:
    """A dialogue in one string as messages; what stands before the first mark is a system message."""
    if not isinstance(text, str):
        raise RowProblem("malformed", f"{part} must be text to be cut into turns, got messages")
    roles = dict(zip(marks, ("user", "assistant"), strict=True))
    found: list[tuple[str, int, int]] = [("system", 0, 0)]
    at = 0
    while True:
        next_marks = [(text.find(mark, at), mark) for mark in marks]
        next_marks = [(place, mark) for place, mark in next_marks if place >= 0]
        if not next_marks:
            break
        place, mark = min(next_marks, key=lambda one: (one[0], -len(one[1])))
        at = place + len(mark)
        found.append((roles[mark], place, at))
    ends = [place for _, place, _ in found[1:]] + [len(text)]
    messages = [
        {"role": role, "content": text[start:end].strip()} for (role, _, start), end in zip(found, ends, strict=True)
    ]
    if not messages[0]["content"]:
        messages = messages[1:]
    if not any(message["role"] != "system" for message in messages):
        raise RowProblem("malformed", f"{part} has none of the marks {marks[0]!r} and {marks[1]!r} of `turns`")
    return messages


def _message(message: Any, part: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise RowProblem("malformed", f"a message of {part} must have role and content, got {message!r:.60}")
    role, content = message["role"], message["content"]
    if isinstance(content, (list, tuple)) and all(
        isinstance(one, Mapping) and one.get("type") == "text" and isinstance(one.get("text"), str) for one in content
    ):
        content = "".join(one["text"] for one in content)
    if role not in ROLES:
        raise RowProblem("malformed", f"the role of a message must be one of {', '.join(ROLES)}, got {role!r:.40}")
    if not isinstance(content, str):
        raise RowProblem("malformed", f"the content of a message of {part} must be text, got {content!r:.40}")
    left_out = [name for name in message if name not in ("role", "content") and message[name] not in (None, [], {}, "")]
    if "tool_calls" in left_out:
        raise RowProblem("malformed", f"a message of {part} has tool calls, which are not read here")
    return {"role": role, "content": content}
