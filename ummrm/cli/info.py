"""`ummrm info`: what the compiled extension was built with, or what a model folder holds, read without its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .merge import check_upcycled
from .screen import quiet_libraries, say, size
from .source import Source, read_folder

_ROUTED = re.compile(r".*\.(experts\.[^.]+|expert_weight|expert_bias)")
_EXPERTS = re.compile(r"(.*)\.(experts|shared_experts)\.[^.]+")


def info(
    folder: Annotated[
        str | None, typer.Argument(help="Folder of a dense or an upcycled model; without it the build is described.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The model's description as JSON; the build's always is.")] = (
        False
    ),
) -> None:
    """Describes a model folder without loading it; without FOLDER, what the compiled extension was built with.

    The build's JSON says which kernels there are, and why there are none for CUDA where it has none.

    Example: ummrm info merged
    """
    if folder is None:
        from .. import __version__
        from ..ops import library

        record = {"ummrm": __version__, **library.build_info(), "no_cuda_kernels": library.no_cuda_kernels}
        print(json.dumps(record, indent=2, default=str))
        return
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"there is no folder {folder!r}; give the folder that holds config.json and the weights.")
    with quiet_libraries():
        record = describe(read_folder(folder, path))
    if as_json:
        print(json.dumps(record, indent=2))
        return
    width = max(len(_label(name)) for name in record)
    for name, value in record.items():
        if value is not None:
            say(f"{_label(name):<{width}}  {_shown(name, value)}")


def describe(source: Source) -> dict[str, Any]:
    """What a model folder holds, as JSON-ready data; None where it does not say.

    Raises:
        UserError: it is an upcycled model that can't be read.
    """
    from ..hf.remote_code import needs_code

    config, headers = source.config, source.headers
    record: dict[str, Any] = {"folder": source.name, "kind": "dense"}
    own_code = needs_code(config)
    if source.is_upcycled:
        record["kind"] = "merging" if check_upcycled(source, own_code=own_code) == "merging" else "mixture"
    record |= {"class": source.class_name, "family": source.model_type.removeprefix("umm_")}
    if source.is_upcycled:
        from ..config import UpcycleConfig

        umm = UpcycleConfig.from_dict(config["umm"])
        record["assignment"] = umm.assignment
        record |= {"num_experts": umm.num_experts, "num_experts_per_tok": umm.num_experts_per_tok}
        record |= {"num_shared_experts": umm.num_shared_experts}
        own = {"experts_in": umm.experts_in, "evaluation": umm.evaluation} if umm.by_sequence else {"gate": umm.gate}
        record |= own
        if record["kind"] == "merging":
            record["shared_share"] = config["umm_merge"].get("shared_share")
        record |= {"base_model": config.get("umm_base_model"), "ummrm": config.get("umm_version")}
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    record["layers"] = layers if isinstance(layers, int) else None
    if headers is not None:
        from ..hf.merge_share import SHARE_NAME

        sites = {match[1] for name in headers if (match := _EXPERTS.fullmatch(name))}
        if source.is_upcycled:
            record["upcycled_layers"] = len(sites)
        # a fixed lambda stands among the weights and is no parameter
        record["parameters"] = sum(h.elements for n, h in headers.items() if not n.endswith(f"{SHARE_NAME}.share"))
        if record["kind"] == "mixture":
            routed = sum(h.elements for name, h in headers.items() if _ROUTED.fullmatch(name))
            record["parameters_per_token"] = (
                record["parameters"] - routed + routed * umm.num_experts_per_tok // (umm.num_experts)
            )
        kinds: dict[str, int] = {}
        for header in headers.values():
            kinds[header.dtype] = kinds.get(header.dtype, 0) + header.elements
        record["dtypes"] = dict(sorted(kinds.items(), key=lambda kind: -kind[1]))
    record["bytes"] = source.num_bytes
    return record


def _label(name: str) -> str:
    symbols = {"num_experts": " (E)", "num_experts_per_tok": " (K)", "num_shared_experts": " (S)"}
    words = {
        "num_experts": "routed experts",
        "num_experts_per_tok": "routed experts per token",
        "num_shared_experts": "shared experts",
        "shared_share": "shared share (lambda)",
        "ummrm": "written by ummrm",
    }
    return words.get(name, name.replace("_", " ")) + symbols.get(name, "")


def _shown(name: str, value: Any) -> str:
    if name.startswith("parameters"):
        return f"{value:,}"
    if name == "bytes":
        return f"{value:,} ({size(value)})"
    if name == "kind":
        return {"dense": "dense", "mixture": "mixture of experts", "merging": "mixture in its merge phase"}[value]
    if name == "dtypes":
        return ", ".join(f"{dtype} ({count:,})" if len(value) > 1 else dtype for dtype, count in value.items())
    return str(value)
