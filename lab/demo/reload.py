"""Proof that an exported model needs no ummrm: stock transformers reloads it in a process that cannot import ummrm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..tasks import Sequences

_ENTRANCES = ["ummrm", "ummrm._C", "ummrm.hf"]


@dataclass(frozen=True)
class Reload:
    """What the other process found.

    Attributes:
        model_class: full name of the class that transformers chose.
        difference: largest absolute difference of a score from this process's.
        scores: how many were compared.
        largest: largest absolute score, for scale.
    """

    model_class: str
    difference: float
    scores: int
    largest: float


class ReloadError(RuntimeError):
    """The exported folder could not be loaded or scored by stock transformers, or ummrm was within reach there."""


@torch.no_grad()
def reload_without_ummrm(model: PreTrainedModel, folder: str | Path, sequences: Sequences, batch_size: int) -> Reload:
    """Scores the same batches here with `model`, and in another process with what stock transformers finds in `folder`.

    Args:
        model: the exported model, on the CPU or elsewhere; a copy of its scores on its own device is compared.
        folder: where it was exported.
        sequences: what is scored, in padded batches.
        batch_size: sequences a batch.

    Raises:
        ReloadError: the process failed, ummrm could be imported in it, weights were missing or left over, or the class
            is not the stock one.
    """
    batches = [sequences.select(index).inputs() for index in torch.arange(len(sequences)).split(batch_size)]
    device = next(model.parameters()).device
    model.eval()
    ours = [model(**{k: v.to(device) for k, v in batch.items()}).logits.squeeze(-1).cpu() for batch in batches]
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: os.path.join(scratch, f"{name}.safetensors") for name in ("inputs", "scores")}
        save_file({f"{i}.{k}": v.contiguous() for i, b in enumerate(batches) for k, v in b.items()}, paths["inputs"])
        request = {
            "folder": str(Path(folder).resolve()),
            "batches": len(batches),
            "threads": torch.get_num_threads(),
            **paths,
        }
        request_path = Path(scratch) / "request.json"
        request_path.write_text(json.dumps(request))
        script = Path(__file__).with_name("_stock_process.py")
        process = subprocess.run(
            [sys.executable, "-I", str(script), str(request_path)], capture_output=True, text=True, cwd=scratch
        )
        if process.returncode != 0:
            raise ReloadError(f"stock transformers could not load or run {folder}:\n{process.stderr.strip()[-2000:]}")
        report = json.loads(process.stdout.strip().splitlines()[-1])
        scores = load_file(paths["scores"])
    _require_stock(report, model)
    theirs = torch.cat([scores[str(i)] for i in range(len(batches))]).double()
    mine = torch.cat(ours).double()
    return Reload(report["model_class"], (theirs - mine).abs().max().item(), len(mine), mine.abs().max().item())


def _require_stock(report: dict, model: PreTrainedModel) -> None:
    if (
        report["blocked_before"] != _ENTRANCES
        or report["blocked_after"] != _ENTRANCES
        or report["loaded_ummrm_modules"]
    ):
        raise ReloadError(
            "ummrm must be out of reach in the reloading process; imports that failed before and after: "
            f"{report['blocked_before']}, {report['blocked_after']}; modules loaded: {report['loaded_ummrm_modules']}."
        )
    expected = f"{type(model).__module__}.{type(model).__qualname__}"
    if report["model_class"] != expected or not expected.startswith("transformers."):
        raise ReloadError(f"the exported model must be of a stock transformers class, got {report['model_class']}.")
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ReloadError(
            f"the exported keys must be the architecture's own; missing {report['missing_keys'][:3]}, "
            f"left over {report['unexpected_keys'][:3]}."
        )
