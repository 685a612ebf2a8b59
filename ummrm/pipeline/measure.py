"""How good the models of a run are on its held-out pairs."""

from __future__ import annotations

import math
from array import array
from typing import Any

import torch
from torch import Tensor

from ..hf.ensembles import score_texts
from ..hf.loading import load_checkpoint
from ..hf.texts import texts_of, token_ids
from . import stages


def measure(at: stages.Setting) -> dict[str, Any]:
    """Accuracy of every model that the run has, on the held-out pairs, with a 95% Wilson interval.

    A tie counts half.
    """
    ids: list[array] = []
    for row in at.pairs.held_out:
        ids += [array("i", token_ids(at.start.tokenizer, text, row)) for text in texts_of(row)]
    folders = {"dense": at.model(stages.DENSE)} if at.recipe.dense is not None else {}
    folders |= {"mixture": at.model(stages.MIXTURE)}
    folders |= {"merged": at.undistilled}
    if at.recipe.distill is not None:
        folders["distilled"] = at.model(stages.MERGED)
    models = {}
    for name, folder in folders.items():
        model: Any = load_checkpoint(folder, dtype=getattr(torch, at.recipe.model.dtype))
        at.start.name_padding(model)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        scores = score_texts(model, ids, at.arguments["train"].per_device_eval_batch_size)
        models[name] = {**accuracy(scores.mean(1).view(-1, 2)), "parameters": model.num_parameters()}
    return {"models": models}


def accuracy(scores: Tensor) -> dict[str, Any]:
    """Share of pairs [N, 2], the preferred answer first, in the right order, with its 95% Wilson interval."""
    chosen, rejected = scores.unbind(1)
    right = ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).sum().item()
    low, high = wilson(right, len(scores))
    return {"accuracy": right / len(scores), "low": low, "high": high, "pairs": len(scores)}


def wilson(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    share = right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
