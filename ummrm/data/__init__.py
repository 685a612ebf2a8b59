"""Preference pairs from files and the hub, read, checked and split as a reward model's training needs them.

`read_pairs(PairsConfig(train="pairs.jsonl"))` gives data sets for TRL's RewardTrainer and a report of every row that
made no pair. Knows nothing of models. `read_pairs` needs `datasets`, which `ummrm[trl]` brings, and is imported when it
is first used; rows of files are read without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import DataError, PairsConfig, PairSource
from .report import DataReport, SourceReport

if TYPE_CHECKING:
    from .reading import PreferenceData, read_pairs

__all__ = ["DataError", "DataReport", "PairSource", "PairsConfig", "PreferenceData", "SourceReport", "read_pairs"]


def __getattr__(name: str) -> Any:
    if name in ("PreferenceData", "read_pairs"):
        return getattr(importlib.import_module(".reading", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
