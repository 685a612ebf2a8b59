"""Reads configurations: YAML to plain data, and plain data to frozen dataclasses, every error one line.

What fields there are and which values they allow stands in the dataclasses; pydantic checks their types, strictly. A
file is refused before it is built if aliases make it grow past any use, or if a mapping has a key twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

T = TypeVar("T")

_MOST_BYTES = 2**18
_MOST_NODES = 100_000  # with aliases written out; our largest study has 400
_MOST_ERRORS = 5
_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping of fields",
}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxdict = _REPR.maxlist = 4


def require(owner: object, name: str, holds: bool, expected: str) -> None:
    """Raises ValueError, naming the field and its value, unless `holds`."""
    if not holds:
        raise ValueError(f"{type(owner).__name__}: `{name}` must be {expected}, got {getattr(owner, name)!r}.")


def near(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` with the names among `known` that are like `name`; empty without any."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


# ---- YAML --------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML of text, numbers, truth values, lists and mappings. `1e-3` is a number (YAML 1.2), a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a YAML file; errors name the file and are one line.

    Raises:
        ValueError: it is too large, or not YAML, or `parse` refuses it.
    """
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"must be at most {_MOST_BYTES} bytes, got {size}.")
        return parse(_load(path.read_bytes()))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _load(data: bytes) -> Any:
    try:
        loader = _Loader(data)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        where = f" at line {at.line + 1}, column {at.column + 1}" if at else ""
        raise ValueError(f"is not valid YAML: {error.problem or error.context}{where}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError("is not a configuration: it is nested too deeply.") from error
    except (TypeError, LookupError, ArithmeticError, AttributeError) as error:  # PyYAML's own, on odd tags and numbers
        raise ValueError(f"is not valid YAML: {error!r}.") from error


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes of a tree whose aliases are written out, counted without writing them out; refuses what cannot be meant."""
    if sizes.get(id(node)) == 0:
        raise ValueError(f"must not contain itself: the alias at line {node.start_mark.line + 1}.")
    if id(node) not in sizes:
        sizes[id(node)] = 0  # under way
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
        inside = sum(_size(child, sizes) for child in children) if not isinstance(node, yaml.ScalarNode) else 0
        sizes[id(node)] = 1 + inside
        if inside > _MOST_NODES:
            raise ValueError(f"must have at most {_MOST_NODES} values with its aliases written out; it has more.")
    return sizes[id(node)]


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"must have each key once, got {_REPR.repr(key.value)} again at line {line}.")
            seen.add(key.value)


# ---- dataclasses -------------------------------------------------------------------------------------------------


def build(cls: type[T], data: Any, where: str) -> T:
    """A dataclass from plain data.

    Args:
        cls: a dataclass. Where a field is one of several, its annotation says by which field they are told apart.
        data: its fields. Lists stand for tuples, integers for numbers; nothing else is converted.
        where: the path of `data`, for errors.

    Raises:
        ValueError: an unknown field, a missing one, a wrong type or value; names the field by its path.
    """
    try:
        text = json.dumps({"root": data}, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be plain data: text, numbers, lists and mappings; {error}.") from error
    try:
        # in JSON, where strict types still take lists for tuples and mappings for dataclasses
        return _model(cls).model_validate_json(text).root
    except pydantic.ValidationError as error:
        raise ValueError(_lines(error, cls, where)) from None


def _plain(value: object) -> Any:
    raise TypeError(f"got {_REPR.repr(value)}")


@functools.cache
def _model(cls: type) -> type[pydantic.BaseModel]:
    """A model around a dataclass: only so does the configuration reach the dataclasses inside, ummrm's among them."""
    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic.create_model(cls.__name__, root=(cls, ...), __config__=config)


def _lines(error: pydantic.ValidationError, cls: type, where: str) -> str:
    """All errors in one line, those of the alternatives of one field together."""
    found: dict[str, list[dict]] = {}
    for one in error.errors(include_url=False):
        found.setdefault(_walk(cls, one["loc"][1:])[0], []).append(one)
    said = [_said(errors, cls, where) for errors in found.values()]
    left = len(said) - _MOST_ERRORS
    return " ".join([*said[:_MOST_ERRORS], *([f"And {left} more."] if left > 0 else [])])


def _said(errors: list[dict], cls: type, where: str) -> str:
    """What is wrong with one field; several errors are of alternatives, none of which fits."""
    kind, location, context = errors[0]["type"], errors[0]["loc"][1:], errors[0].get("ctx", {})
    path, owner = _walk(cls, location)
    parent = where + _walk(cls, location[:-1])[0]
    value = _REPR.repr(errors[0]["input"])
    if kind == "value_error":
        return f"{where}{path}: {context['error']}"
    if kind == "unexpected_keyword_argument":
        fields = [f.name for f in dataclasses.fields(owner)]
        return f"{parent} has no field {location[-1]}{near(location[-1], fields)}; it has {', '.join(fields)}."
    if kind == "missing":
        return f"{parent} lacks {_dotted(location[-1:]).removeprefix('.')}."
    if kind == "union_tag_invalid":
        allowed = context["expected_tags"].replace("'", "")
        return f"{where}{path}.kind must be one of {allowed}, got {_REPR.repr(context['tag'])}."
    if kind == "union_tag_not_found":
        return f"{where}{path} lacks kind."
    if kind not in _TYPES:
        return f"{where}{path}: {errors[0]['msg']}, got {value}."
    expected = dict.fromkeys(_TYPES.get(one["type"], one["msg"]) for one in errors)
    return f"{where}{path} must be {' or '.join(expected)}, got {value}."


def _walk(cls: type, location: Iterable[str | int]) -> tuple[str, Any]:
    """A location of pydantic's as a path, without the names of alternatives, and the innermost dataclass on the way."""
    path, owner, hint = "", cls, cls
    for part in location:
        options = [hint]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        if len(options) > 1:  # this part names one of them
            named = (o for o in options if part in (getattr(o, "kind", None), getattr(o, "__name__", None), str(o)))
            hint = next(named, None)
            continue
        (hint,) = options
        path += _dotted([part])
        if dataclasses.is_dataclass(hint):
            owner, hint = hint, typing.get_type_hints(hint).get(str(part))
        else:
            inner = typing.get_args(hint) or (None,)
            hint = inner[1] if typing.get_origin(hint) is dict else inner[0]
    return path, owner


def _dotted(path: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
