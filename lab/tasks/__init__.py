"""Preference tasks: a synthetic one with a known gold reward, and pairs made from real text."""

from .base import PolicySamples, PreferencePairs, Sequences, Task, concatenate
from .synthetic import GoldReward, SyntheticTaskConfig, make_synthetic_task
from .text import TextTaskConfig, corrupt, english_passages, make_text_task

__all__ = [
    "GoldReward",
    "PolicySamples",
    "PreferencePairs",
    "Sequences",
    "SyntheticTaskConfig",
    "Task",
    "TextTaskConfig",
    "concatenate",
    "corrupt",
    "english_passages",
    "make_synthetic_task",
    "make_text_task",
]
