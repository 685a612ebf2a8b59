"""Options of the commands that need reading or checking: a configuration file, layers, a device, a dtype.

A configuration file is plain data of a few lines: what YAML could do beyond that (anchors that expand to gigabytes,
keys given twice, megabytes of anything) is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..config import DTYPES
from .errors import UserError, one_line

_LARGEST = 16 << 10

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with a model or its tokenizer, which can do whatever you can.",
    ),
]


def read_options(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        UserError: it is no file, too large, not YAML or JSON, or no mapping.
    """
    if not path.is_file():
        what = "is not one" if path.exists() else "is not there"
        raise UserError(f"--config must be a file of UpcycleConfig fields, and {path} {what}.")
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} must be a short file of UpcycleConfig fields, got {path.stat().st_size} bytes.")
        text = path.read_text(encoding="utf-8")
        data = _read_json(text) if path.suffix == ".json" else yaml.load(text, _PlainLoader)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{path} can't be read: it is nested too deeply.") from error
    except Exception as error:  # PyYAML raises what its constructors happen to: overflows, dates that are none
        raise UserError(f"{path} can't be read: {one_line(error)}; mend the file.") from error
    if not isinstance(data, dict):
        example = "such as `num_experts: 7`"
        raise UserError(f"{path} must hold a mapping of UpcycleConfig fields ({example}), got a {type(data).__name__}.")
    return data


def _read_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[Any, Any]]) -> dict:
    data: dict = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {key!r} is given twice")
        data[key] = value
    return data


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without anchors and aliases, and with each key once."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"anchors and aliases are not allowed, and line {event.start_mark.line + 1} has one")
        return super().compose_node(parent, index)

    def plain_mapping(self, node):
        return _unique(self.construct_pairs(node, deep=True))


# SafeLoader's own entry takes the last of equal keys, and merges others in (<<)
_PlainLoader.add_constructor("tag:yaml.org,2002:map", _PlainLoader.plain_mapping)


def read_layers(text: str) -> str | int | list[int]:
    """`UpcycleConfig.layers` as the command line has it: "all", "2" (every second) or "3,7,11".

    Raises:
        UserError: it is none of these.
    """
    if text == "all":
        return text
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
        if not numbers:
            raise ValueError
    except ValueError:
        raise UserError(
            f'--layers must be "all", a number n (every n-th), or indices separated by commas, got {text!r}.'
        ) from None
    return numbers[0] if "," not in text else numbers


def check_seed(seed: int) -> None:
    """Raises UserError unless `seed` is one that torch takes."""
    if not 0 <= seed < 2**63:
        raise UserError(f"`--seed` must be an integer from 0 to 2^63 - 1, got {seed}.")


def check_dtype(name: str | None) -> None:
    """Raises UserError unless `name` is None or a dtype that a model can be saved in."""
    if name is not None and name not in DTYPES:
        raise UserError(f"`--dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")


def read_shard_size(text: str) -> int:
    """Bytes of `--max-shard-size`, such as 5GB or 300MB.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s?([KMGT])B", text.strip().upper())
    num_bytes = int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2]))) if match else 0
    if num_bytes < 1:
        raise UserError(f"`--max-shard-size` must be a number and KB, MB, GB or TB, such as 300MB, got {text!r}.")
    return num_bytes


def check_device(name: str) -> None:
    """Raises UserError unless `name` is the CPU or a CUDA device of this machine."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"`--device` must be cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            what = f"this machine has {count} CUDA devices" if count else "torch finds no CUDA device here"
            raise UserError(f"`--device` must be a device of this machine, got {name!r}, and {what}; use --device cpu.")
