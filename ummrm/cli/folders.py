"""Model folders as the commands read and write them."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from ..hf import modeling


def load_model(folder: str, config) -> PreTrainedModel:
    """Loads a folder as the class that saved it: ours from `modeling`, any other from transformers."""
    name = (config.architectures or [None])[0]
    if name is None:
        raise ValueError(
            f"{folder}/config.json must name its class in `architectures`, and does not; save the model again."
        )
    cls = getattr(modeling, name, None) if name.startswith("Umm") else getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{folder} holds a {name}, which neither transformers nor ummrm knows.")
    return cls.from_pretrained(folder)


def copy_tokenizer(source: str, out: Path) -> None:
    """Takes a local folder's tokenizer files along, so that the new folder is as complete as the old one."""
    for pattern in ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        for path in Path(source).glob(pattern):
            if path.is_file():
                shutil.copy2(path, out / path.name)
