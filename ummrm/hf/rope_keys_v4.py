"""What transformers 4 reads from a configuration that transformers 5 writes otherwise: the rotary embedding's keys.

transformers 5 saves `rope_parameters` alone; 4.57 ignores it and falls back to its default base without a word, so that
a merged model would score differently in the tools that still pin it. Which keys a family needs stands in its row.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from .families import Family


def write_rope_keys_v4(config: PreTrainedConfig, family: Family) -> None:
    """Adds the legacy rotary keys to a stock configuration, beside the new ones."""
    rope = getattr(config, "rope_parameters", None) or {}
    for legacy, current in family.rope_keys_v4:
        value = _lookup(rope, current)
        if value is not None:
            setattr(config, legacy, value)
    scaled = rope.get("full_attention", rope)  # one for each kind of attention, or one for all
    if family.rope_scaling_keys_v4 != () and scaled.get("rope_type", "default") != "default":
        own = {current.rpartition(".")[2] for _, current in family.rope_keys_v4}
        kept = family.rope_scaling_keys_v4 or [key for key in scaled if key not in own]
        # In transformers 5 `rope_scaling` is an alias of rope_parameters; the entry is for the JSON alone.
        values = {**scaled, "type": scaled["rope_type"]}
        config.__dict__["rope_scaling"] = {key: values[key] for key in kept if key in values}


def _lookup(tree: dict, path: str) -> object:
    node: object = tree
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node
