"""From a row of data to the tokens that a reward model scores, as TRL's RewardTrainer makes them of preference pairs.

A text is a string or a conversation (a list of messages). Reading files is `data`'s business, scoring `ensembles.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer

Text = str | list[dict[str, Any]]

TEXT_FORMATS = "`prompt` and `completion`, `messages`, `text`, `chosen` and `rejected` (with or without `prompt`)"
FORMATS = f"{TEXT_FORMATS}, or tokenised `input_ids`, or `chosen_ids` and `rejected_ids`"


def texts_of(row: Mapping[str, Any]) -> list[Text]:
    """The texts of a row: one, or the two of a preference pair, chosen first.

    Raises:
        ValueError: no known columns, or one that holds neither text nor messages.
    """
    held = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= held:
        parts = [[row.get("prompt"), row[key]] for key in ("chosen", "rejected")]
    elif "messages" in held:
        parts = [[row["messages"]]]
    elif "text" in held:
        parts = [[row["text"]]]
    elif {"prompt", "completion"} <= held:
        parts = [[row["prompt"], row["completion"]]]
    else:
        raise ValueError(f"a row of the data must have {FORMATS}, got {', '.join(sorted(held)) or 'nothing'}.")
    return [joined(*(part for part in one if part is not None)) for one in parts]


def joined(*parts: Any) -> Text:
    """Prompt and answer, both strings or both lists of messages, as one text.

    Raises:
        ValueError: they are of different kinds, or of another one.
    """
    kinds = {str if isinstance(part, str) else list if isinstance(part, list) else type(part) for part in parts}
    if kinds not in ({str}, {list}):
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"prompt and answer must both be text or both be lists of messages, got {names}.")
    text = parts[0]
    for part in parts[1:]:
        text = text + part
    return text


def token_ids(tokenizer: Any, text: Text, row: Mapping[str, Any] | None = None) -> list[int]:
    """The tokens of a text: a conversation by the chat template, a string with the end-of-sequence token behind it.

    Args:
        tokenizer: the reward model's.
        text: what it scores.
        row: may hold `tools` and `chat_template_kwargs` for the template, as in TRL.

    Raises:
        ValueError: a conversation, and the tokenizer has no chat template.
    """
    if isinstance(text, str):
        return many_token_ids(tokenizer, [text])[0]
    row = {} if row is None else row
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"`{type(tokenizer).__name__}` must have a chat template for conversations; set tokenizer.chat_template, "
            "or give plain text."
        )
    options = row.get("chat_template_kwargs") or {}
    encoded = tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, tools=tools, **options)
    return list(encoded["input_ids"])


def many_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`token_ids` of strings, in one call: one by one a fast tokenizer takes several times as long."""
    end = tokenizer.eos_token or ""
    ended = [text if text.endswith(end) else text + end for text in texts]
    return [list(ids) for ids in tokenizer(ended)["input_ids"]] if ended else []


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same tokens of every text, as far as their settings say."""
    if one is other:
        return True
    settings = [(t.get_vocab(), t.eos_token, getattr(t, "chat_template", None), _rules(t)) for t in (one, other)]
    return settings[0] == settings[1]


def _rules(tokenizer: Any) -> Any:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return type(tokenizer)
    rules = json.loads(fast.to_str())
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}  # of the last call


def known_tokenizer(model: Any) -> Any:
    """The tokenizer of the folder or hub name that a model was loaded from, if it lies on this machine, or None."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # whatever a folder without a sound tokenizer makes of it
        return None
