"""Frozen dataclasses from plain data: what a recipe's and a study's YAML is read with."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def require(owner: object, name: str, holds: bool, expected: str) -> None:
    """Raises ValueError, naming the field and its value, unless `holds`."""
    if not holds:
        raise ValueError(f"{type(owner).__name__}: `{name}` must be {expected}, got {getattr(owner, name)!r}.")


def read_yaml(path: Path, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a YAML file; errors name the file.

    Raises:
        ValueError: it is not YAML, or `parse` refuses it.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    try:
        return parse(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def build(cls: type, data: Any, where: str):
    """A dataclass from plain data.

    Args:
        cls: a dataclass; a field that is one of several dataclasses is told apart by `kind`, their `KIND`.
        data: its fields.
        where: the path of `data`, for errors.

    Raises:
        ValueError: an unknown field, a missing one, a wrong type or value; names the field by its path.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a mapping of fields, got {data!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(map(str, data)) - set(known))
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(unknown)}; it has {', '.join(known)}.")
    required = [
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    try:
        return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str):
    """`value` as the annotated type; YAML's quirks (1e-3 is a string, lists for tuples) are undone here."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}.")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, got {value!r}.")
        if dataclasses.is_dataclass(arguments[1]):
            return {str(key): build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        return dict(value)
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[hint]
    raise ValueError(f"{where} must be {name}, got {value!r}.")


def _convert_union(arguments: tuple, value: Any, where: str):
    if value is None and type(None) in arguments:
        return None
    kinds = {cls.KIND: cls for cls in arguments if hasattr(cls, "KIND")}
    if kinds:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if kind not in kinds:
            raise ValueError(f"{where}.kind must be one of {', '.join(kinds)}, got {kind!r}.")
        return build(kinds[kind], {k: v for k, v in value.items() if k != "kind"}, where)
    errors = []
    for argument in arguments:
        if argument is not type(None):
            try:
                return _convert(argument, value, where)
            except ValueError as error:
                errors.append(str(error))
    raise ValueError(" Or: ".join(errors))
