"""Saving a tokenizer so that transformers 4 reads it too.

transformers 5 writes two things that 4.57 stops at: `TokenizersBackend`, its own name of the class that both versions
know as `PreTrainedTokenizerFast`, and a list as `extra_special_tokens`, which both read as `additional_special_tokens`.
And it leaves out which inputs a tokenizer gives, where 4 then adds `token_type_ids`: 4.51's Llama stops at them. The
keys of a model's configuration are `rope_keys_v4.py`'s business.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import write_atomically

_FILE = "tokenizer_config.json"


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Saves a tokenizer like its own `save_pretrained`, under names that transformers 4 knows as well.

    Args:
        tokenizer: the tokenizer, or whatever else a trainer processes texts with; what writes no tokenizer_config.json
            is saved as it is.
        folder: where it goes; made if it is not there.

    Raises:
        OSError: a file can't be written.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / _FILE
    if not path.is_file():
        return
    told = json.loads(path.read_text(encoding="utf-8"))
    if told.get("tokenizer_class") == "TokenizersBackend":
        told["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(told.get("extra_special_tokens"), list):
        told["additional_special_tokens"] = told.pop("extra_special_tokens")
    if hasattr(tokenizer, "model_input_names"):
        told.setdefault("model_input_names", list(tokenizer.model_input_names))
    write_atomically(path, json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
