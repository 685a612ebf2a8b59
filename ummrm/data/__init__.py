"""Preference pairs from files and the hub, read, checked and split as a reward model's training needs them.

`read_pairs(PairsConfig(train="pairs.jsonl"))` gives data sets for TRL's RewardTrainer and a report of every row that
made no pair. Knows nothing of models; needs `datasets`, which `ummrm[trl]` brings.
"""

from .config import DataError, PairsConfig, PairSource
from .reading import PreferenceData, read_pairs
from .report import DataReport, SourceReport

__all__ = ["DataError", "DataReport", "PairSource", "PairsConfig", "PreferenceData", "SourceReport", "read_pairs"]
