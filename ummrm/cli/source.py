"""The model that a command reads: found in a folder or on the hub, and checked before any work.

A hub name becomes the folder of its copy in the hub's cache, so that all that follows deals with folders alone. What is
wrong with a folder's configuration or its weight files is said here, within seconds; only holes in the weights are left
to loading.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, blaming, one_line
from .headers import TensorHeader, read_headers, read_json
from .screen import note

HUB_SECONDS = 3.0  # how long the hub may take to say what a repository holds
_HUB_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
# the same weights in other formats, which transformers does not read where there are safetensors
_OTHER_FORMATS = ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.tflite", "*.pth", "*.ckpt", "*.pb")
# what a tokenizer is loaded from, in every format that transformers reads
TOKENIZER = re.compile(
    r"chat_template\.(jinja|json)|additional_chat_templates|added_tokens\.json|special_tokens_map\.json"
    r"|tokenizer.*|(spm|spiece|sentencepiece).*\.model|vocab\..*|merges\.txt"
)


@dataclass(frozen=True)
class Source:
    """A model folder that can be read.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        config: its config.json.
        headers: its tensors; None where they are pickled.
    """

    name: str
    folder: Path
    config: dict
    headers: dict[str, TensorHeader] | None

    @property
    def model_type(self) -> str:
        """transformers' name of its family, "" without one."""
        return str(self.config.get("model_type") or "")

    @property
    def is_upcycled(self) -> bool:
        """Whether ummrm wrote it as a mixture, in either phase."""
        return self.model_type.startswith("umm_") or "umm" in self.config

    @property
    def class_name(self) -> str:
        """The model class that config.json names.

        Raises:
            UserError: it names none.
        """
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise UserError(
                f"{self.folder / 'config.json'} must name the model's class in `architectures`, and does not; save the "
                "model again with its save_pretrained."
            )
        return names[0]

    @property
    def config_dtype(self) -> str | None:
        """The dtype that config.json says the model has, which need not be that of its weights; None if it does not."""
        name = self.config.get("dtype", self.config.get("torch_dtype"))
        return name if name in ("float64", "float32", "float16", "bfloat16") else None

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights."""
        if self.headers is not None:
            return sum(header.num_bytes for header in self.headers.values())
        return sum(path.stat().st_size for path in self.folder.glob("*.bin"))


def open_source(name: str, revision: str | None = None) -> Source:
    """Finds a model and reads what describes it.

    Args:
        name: a folder, or a hub name `organisation/model`.
        revision: branch, tag or commit of a hub name; None is its main branch.

    Raises:
        UserError: there is no such model, its configuration or weight files can't be read, or a folder is given a
            revision.
    """
    return read_folder(name, _folder_of(name, revision))


def read_folder(name: str, folder: Path) -> Source:
    """The model in `folder`, which the user called `name`; a save into it that was interrupted is completed first.

    Raises:
        UserError: its configuration or weight files, or what an interrupted save left, can't be read.
    """
    from ..hf.loading import settle

    with blaming("", OSError, ValueError):
        settle(folder)  # until then config.json may lie elsewhere
    if not os.path.lexists(folder / "config.json"):
        what = f"{name} is no model folder: it has no config.json"
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{what}, but an adapter's; merge the adapter first (merge_and_unload) and save the model.")
        raise UserError(f"{what}; give the folder that the model's save_pretrained wrote.")
    config = read_json(folder / "config.json")
    headers = read_headers(folder)
    layers = config.get("num_hidden_layers")
    if headers is not None and isinstance(layers, int) and layers > max(len(headers), 1):
        # building so many would take hours and all memory before the weights are found not to fit
        raise UserError(
            f"{folder / 'config.json'}: `num_hidden_layers` must fit the weights, got {layers} layers for "
            f"{len(headers)} tensors; download or save the model again."
        )
    return Source(name, folder, config, headers)


def admit_code(source: Source, trust: bool) -> None:
    """Runs and registers the code that comes with a model, where it needs some.

    Raises:
        UserError: it is not trusted, or can't be used.
    """
    from ..hf.remote_code import needs_code, register_code

    if not needs_code(source.config):
        return
    if not trust:
        raise UserError(f"{source.name} comes with code of its own; give --trust-remote-code if you trust its authors.")
    with blaming(f"{source.name}: its code can't be used", Exception):  # whatever it raises
        register_code(source.folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a file of a tokenizer."""
    return any(TOKENIZER.fullmatch(path.name) for path in folder.iterdir())


def _folder_of(name: str, revision: str | None) -> Path:
    path = Path(name)
    if revision == "":
        raise UserError('`--revision` must be a branch, tag or commit, got ""; leave it out for the main branch.')
    if name and os.path.isdir(path):
        if revision is not None:
            raise UserError(f"--revision must be left out for a folder, which has none, got {revision!r} for {name}.")
        return path
    if name and os.path.lexists(path):
        what = "is a file" if path.is_file() else "is no folder"
        raise UserError(f"{name} {what}; give the folder that holds config.json and the weights.")
    if _HUB_NAME.fullmatch(name) and ".." not in name:
        return _from_hub(name, revision)
    shown = name if len(name) < 200 else f"{name[:200]}..."
    raise UserError(f"there is no folder {shown!r}{_similar(path)}; a model of the hub is given as organisation/model.")


def _similar(path: Path) -> str:
    """ ", did you mean ...?" where a folder beside it has nearly the name."""
    try:
        others = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name[:200], others, n=1)
    return f" (did you mean {str(path.with_name(close[0]))!r}?)" if close else ""


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        IncompleteSnapshotError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    answer = _ask_hub(name, revision)
    no_folder = f"there is no folder {name!r}{_similar(Path(name))}, and"
    if isinstance(answer, GatedRepoError):
        raise UserError(f"{no_folder} the hub wants its conditions accepted first: log in with `hf auth login`.")
    if isinstance(answer, RevisionNotFoundError):
        raise UserError(f"{name} has no revision {revision!r} on the hub; give a branch, tag or commit of it.")
    if isinstance(answer, RepositoryNotFoundError):
        raise UserError(f"{no_folder} the hub has no such model, or a private one; check the name or log in.")
    if not isinstance(answer, BaseException):
        ignored = [*_OTHER_FORMATS, "*.bin"] if any(f.endswith(".safetensors") for f in answer) else _OTHER_FORMATS
        with blaming(f"{name} can't be fetched from the hub", Exception, remedy="try again, or give a local folder."):
            return Path(snapshot_download(name, revision=revision, ignore_patterns=list(ignored)))
    why = f"the hub can't be reached ({one_line(answer)})"
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:
        folder = Path(error.snapshot_path)
    except (OSError, ValueError) as error:
        raise UserError(f"{no_folder} {why}; give a local folder, or try again with a network.") from error
    lacking = "" if has_tokenizer(folder) else "; it has no tokenizer, so the output has none"
    note(f"note: {why}; {name} is taken from the cache{lacking}")
    return folder


def _ask_hub(name: str, revision: str | None) -> Iterable[str] | BaseException:
    """The names of a repository's files, or why there is no answer within `HUB_SECONDS`.

    The request has a time limit, which does not cover looking its server up; the thread, which nobody waits for, does.
    """
    from huggingface_hub import HfApi

    answers: list[Iterable[str] | BaseException] = []

    def ask() -> None:
        try:
            info = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
            answers.append([file.rfilename for file in info.siblings or ()])
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers[0] if answers else TimeoutError(f"no answer in {HUB_SECONDS:g} s")
