"""`ummrm upcycle`: a saved dense model into a saved mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from transformers import AutoConfig

from .. import UpcycleConfig
from .. import upcycle as upcycle_model
from .folders import copy_tokenizer, load_model
from .output import say


def upcycle(
    dense: Annotated[str, typer.Argument(help="Folder (or hub name) of a dense Hugging Face model.")],
    out: Annotated[Path, typer.Argument(help="Folder for the upcycled model.")],
    num_experts: Annotated[int, typer.Option(help="Routed experts, E.")] = 7,
    num_experts_per_tok: Annotated[int, typer.Option(help="Routed experts per token, K.")] = 5,
    num_shared_experts: Annotated[int, typer.Option(help="Shared experts, S.")] = 1,
    layers: Annotated[str, typer.Option(help='"all", a number n (every n-th), or indices such as 3,7,11.')] = "all",
    config: Annotated[Path | None, typer.Option(help="YAML file of further UpcycleConfig fields.")] = None,
    seed: Annotated[int, typer.Option(help="Of the routers' initialisation.")] = 0,
) -> None:
    """Upcycles a saved dense model into a mixture of experts that computes the same."""
    options = {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "num_shared_experts": num_shared_experts,
        "layers": _layers(layers),
        **_yaml_mapping(config),
    }
    settings = UpcycleConfig.from_dict(options)
    torch.manual_seed(seed)
    model = upcycle_model(load_model(dense, AutoConfig.from_pretrained(dense)), settings)
    model.save_pretrained(out)
    copy_tokenizer(dense, out)
    say(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, saved in {out}")


def _layers(text: str) -> str | int | list[int]:
    if text == "all":
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'--layers must be "all", a number, or numbers separated by commas, got {text!r}.') from None
    return numbers[0] if len(numbers) == 1 and "," not in text else numbers


def _yaml_mapping(path: Path | None) -> dict:
    if path is None:
        return {}
    data = yaml.safe_load(path.read_text())
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of UpcycleConfig fields, got {type(data).__name__}.")
    return data
