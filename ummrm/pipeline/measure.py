"""What the models of a run are worth on its held-out pairs: an evaluation with its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..evaluation import EvaluationData, RewardScorer, evaluate, write_report
from ..evaluation.reading import LabelledPair
from ..hf.sharding import unpartitioned
from . import stages


def measure(at: stages.Setting) -> dict[str, Any]:
    """Evaluates every model that the run has; writes evaluation.json and report.html.

    Returns:
        Of each model: accuracy with its 95% interval, pairs and parameters.
    """
    folders = {"dense": at.model(stages.DENSE)} if at.recipe.dense is not None else {}
    folders |= {"mixture": at.model(stages.MIXTURE), "merged": at.undistilled}
    if at.recipe.distill is not None:
        folders["distilled"] = at.model(stages.MERGED)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    batch_size = at.arguments["train"].per_device_eval_batch_size

    def loader(name: str, folder: Path) -> Any:
        return lambda: RewardScorer.load(
            folder,
            device=device,
            dtype=at.recipe.model.dtype,
            batch_size=batch_size,
            name=name,
            trust_remote_code=at.recipe.model.trust_remote_code,
        )

    found: dict[str, Any] = {}

    def run() -> None:
        with unpartitioned():
            result = evaluate(
                {name: loader(name, folder) for name, folder in folders.items()},
                EvaluationData(_held_out(at), [], []),
                at.recipe.evaluation_config(),
            )
        write_report(result, at.folder)
        for name, one in result.models.items():
            assert one.accuracy is not None  # there are pairs
            share = one.accuracy.share
            found[name] = {"accuracy": share.value, "low": share.low, "high": share.high, "pairs": share.count}
            found[name]["parameters"] = one.parameters

    stages.in_first(run)
    return {"models": found}


def _held_out(at: stages.Setting) -> list[LabelledPair]:
    pairs = []
    for number, row in enumerate(at.pairs.held_out):
        prompt = row.get("prompt")
        key = repr(prompt) if prompt else f"pair {number}"
        pairs.append(LabelledPair(prompt, row["chosen"], row["rejected"], "held-out pairs", key))
    return pairs
