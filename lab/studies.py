"""Studies by file or by name: finds them, and puts what a study extends beneath its own sections."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .backbone.config import BackboneStudy, with_choice
from .config import StudyConfig
from .reading import read_yaml


def load_study(source: str | Path) -> StudyConfig | BackboneStudy:
    """Reads a study from a YAML file, or from those that this package brings, by name (`shipped_studies`).

    A file may say `extends: NAME`, another study by file or name, and then gives only the sections that differ.

    Raises:
        FileNotFoundError: there is neither such a file nor such a name.
        ValueError: it is not YAML, or not a study; says where.
    """
    path = _study_file(source)

    def made(data: Any) -> StudyConfig | BackboneStudy:
        data = _extended(data, (path,))
        if isinstance(data, Mapping) and data.get("kind") == BackboneStudy.kind:
            return BackboneStudy.from_dict(with_choice(data, path.parent))
        return StudyConfig.from_dict(data)

    return read_yaml(path, made)


def shipped_studies() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    folder = Path(str(resources.files(__package__) / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _study_file(source: str | Path, beside: Path | None = None) -> Path:
    """A study's file, given by its path, seen from the folder `beside` if given, or by the name of a shipped one."""
    path = Path(source) if beside is None else beside / source
    try:
        if path.is_file():
            return path
    except OSError:
        pass  # no file has a name as long as that
    shipped = shipped_studies()
    if str(source) not in shipped:
        raise FileNotFoundError(f"no study at {source}, and none is shipped by that name: {', '.join(shipped)}.")
    return shipped[str(source)]


def _extended(data: Any, files: tuple[Path, ...]) -> Any:
    """A study's plain data with the sections of the study that it extends, where it has none of its own.

    `files`: its file, the last one, and those that extend it.
    """
    if not isinstance(data, Mapping) or "extends" not in data:
        return data  # whole, or for `build` to refuse
    if not isinstance(data["extends"], str):
        raise ValueError(f"`extends` must be the name or the file of a study, got {data['extends']!r}.")
    try:
        base = _study_file(data["extends"], files[-1].parent)
    except FileNotFoundError as error:
        raise ValueError(f"`extends`: {error}") from error
    if base.resolve() in (file.resolve() for file in files):
        raise ValueError(f"`extends` must not lead back to where it came from, got {data['extends']!r}.")
    sections = {name: value for name, value in data.items() if name != "extends"}
    return {**read_yaml(base, lambda found: _extended(found, (*files, base))), **sections}
