"""What the weight files of a model folder say of themselves: names, shapes and dtypes, read without the weights.

A command learns here, in milliseconds, that a file is cut short or a shard is missing, how large its output will be,
and what `ummrm info` shows. Loading itself is `ummrm.hf`'s.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from .errors import UserError, blaming

DTYPES = {  # safetensors' name to torch's, and bytes of an element
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LARGEST_JSON = 64 << 20


class TensorHeader(NamedTuple):
    """One tensor: its dtype by torch's name, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_headers(folder: Path) -> dict[str, TensorHeader] | None:
    """The tensors of a model folder by name; None where weights are pickled, which have no header.

    Raises:
        UserError: there are no weights, a file that the index names is missing, or a file is not what it should be.
    """
    index: dict[str, str] = {}
    if (folder / _WEIGHTS).is_file():
        files = [folder / _WEIGHTS]
    elif (folder / _INDEX).is_file():
        index = _read_index(folder)
        files = [folder / name for name in sorted(set(index.values()))]
    elif any((folder / name).is_file() for name in _PICKLED):
        return None
    else:
        raise UserError(f"{folder} holds no weights ({_WEIGHTS} or {_INDEX}); download or save the model again.")
    found: dict[str, TensorHeader] = {}
    for path in files:
        held = _read_file(path)
        lacking = sorted(name for name, file in index.items() if file == path.name and name not in held)
        twice = sorted(held.keys() & found.keys())
        if lacking or twice:
            if lacking:
                what = f"must hold {lacking[0]}, which {_INDEX} names there, and does not"
            else:
                what = f"holds {twice[0]}, and so does another file of {_INDEX}"
            raise UserError(f"{path} {what}; download or save the model again.")
        found |= held
    return found


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, all of which are there and in the folder."""
    names = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / _INDEX} must hold a `weight_map` of tensor names to files; save the model again.")
    for name in sorted(set(names.values())):
        if name in ("", ".", "..") or Path(name).name != name or not _stays_in(folder, folder / name):
            raise UserError(
                f"{folder / _INDEX} must name files of its own folder, got {name[:200]!r}, which leads out of it; "
                "download or save the model again."
            )
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        first = f"first {missing[0].name}" if missing else "it names none"
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(files)} weight files that {_INDEX} names, {first}; download or "
            "save the model again."
        )
    return names


def _stays_in(folder: Path, path: Path) -> bool:
    """Whether a file is in the folder once links are followed; a snapshot in the hub's cache is made of such links."""
    home = folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parents[2]
    return path.resolve().is_relative_to(home)


def _read_file(path: Path) -> dict[str, TensorHeader]:
    from safetensors import SafetensorError, safe_open

    remedy = "the file is cut short or no safetensors file; download or save the model again."
    found = {}
    with blaming(f"{path} can't be read", SafetensorError, OSError, ValueError, remedy=remedy):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                kind, shape = part.get_dtype(), tuple(part.get_shape())
                dtype, width = DTYPES.get(kind, (kind.lower(), 1))
                found[name] = TensorHeader(dtype, shape, math.prod(shape) * width)
    return found


def read_json(path: Path) -> dict:
    """A JSON file that holds a mapping.

    Raises:
        UserError: it is not there, is no plain file, is not JSON, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path} must be a file, and {'is not one' if path.exists() else 'is not there'}.")
    if path.stat().st_size > _LARGEST_JSON:
        raise UserError(f"{path} must be a description in JSON, got {path.stat().st_size} bytes.")
    try:
        data = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(f"{path} can't be read: {where}; mend it, or download or save the model again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {type(error).__name__}; download or save the model again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping, got a {type(data).__name__}; download or save the model again.")
    return data
