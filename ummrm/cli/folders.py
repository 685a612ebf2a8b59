"""The seam between the commands and `ummrm.hf`: loading a model folder without holes, saving, taking the rest along."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

_NOT_COMPANIONS = ("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", ".*")


def load_checkpoint(source, *, expect=None, new_head=False):
    """Loads a folder as the class that saved it; a missing or unexpected tensor is an error that names it.

    Args:
        source: folder of the model.
        expect: "dense", "upcycled", or None for either.
        new_head: make a reward model of a base model, with a fresh head.

    Raises:
        ValueError: it is of the other kind, of no class that transformers or ummrm knows, or lacks weights.
    """
    import transformers

    from ..hf import modeling

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    upcycled = hasattr(config, "umm_phase")
    if expect is not None and upcycled != (expect == "upcycled"):
        raise ValueError(f"{source} must be {expect}, and is not.")
    if new_head:
        config.num_labels = 1
        cls: Any = transformers.AutoModelForSequenceClassification
    else:
        name = config.architectures[0]
        cls = getattr(modeling if upcycled else transformers, name, None)
        if cls is None:
            raise ValueError(f"{source} holds a {name}, which neither transformers nor ummrm knows.")
    model, info = cls.from_pretrained(source, config=config, output_loading_info=True, ignore_mismatched_sizes=True)
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise ValueError(f"{source}: {name!r} must be of shape {tuple(wanted)}, got {tuple(found)}.")
    fresh = ("score.", "classifier.", "pre_classifier.", "head.", "pooler.", "bert.pooler.") if new_head else ()
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(fresh))
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights, first {missing[0]!r}; save the model again.")
    return model


def save_pretrained(model, folder) -> None:
    """Saves atomically, a merged model with its card."""
    import ummrm

    own = vars(model).get("save_pretrained")
    own(folder) if own is not None else ummrm.save_pretrained(model, folder)


def copy_companions(source, target) -> None:
    """Takes everything that is not weights or config from one model folder into another, which keeps its own card."""
    source, target = Path(source), Path(target)
    for path in sorted(source.iterdir()):
        own_card = path.name == "README.md" and (target / path.name).exists()
        if path.is_file() and not own_card and not any(path.match(pattern) for pattern in _NOT_COMPANIONS):
            shutil.copy2(path, target / path.name)
