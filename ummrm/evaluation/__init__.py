"""What a reward model is worth: rewards of texts, accuracy, calibration, shortcuts, best-of-n, and a report of them.

    from ummrm.data import PairSource
    from ummrm.evaluation import RewardScorer, evaluate, read_evaluation_data, write_report

    data = read_evaluation_data([PairSource("pairs.jsonl")])
    result = evaluate({"mine": RewardScorer.load("merged")}, data)
    write_report(result, "report")

`RewardScorer` needs the core alone; the rest needs what `ummrm[run]` brings, and is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .reading import EvaluationData, read_candidates, read_evaluation_data
    from .report import write_report
    from .runner import Evaluation, EvaluationConfig, ModelResult, evaluate
    from .scoring import RewardScorer, Scores, ScoringError

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "EvaluationData",
    "ModelResult",
    "RewardScorer",
    "Scores",
    "ScoringError",
    "evaluate",
    "read_candidates",
    "read_evaluation_data",
    "write_report",
]

_MODULES = {
    "runner": ("Evaluation", "EvaluationConfig", "ModelResult", "evaluate"),
    "reading": ("EvaluationData", "read_candidates", "read_evaluation_data"),
    "report": ("write_report",),
    "scoring": ("RewardScorer", "Scores", "ScoringError"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
