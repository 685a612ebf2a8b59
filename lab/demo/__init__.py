"""The main job as a library: train a dense reward model, upcycle, train, merge, distil, export, reload.

`run_recipe(load_recipe("demo"), "out")` runs it, `write_report` writes tables and plots. Needs the extra `ummrm[lab]`;
the product does not know this package.
"""

from .config import (
    CheckConfig,
    DistillConfig,
    EvaluationConfig,
    ModelConfig,
    RecipeConfig,
    TrainConfig,
    load_recipe,
    shipped_recipes,
)
from .reload import Reload, ReloadError, reload_without_ummrm
from .report import raise_for_failed_checks, result_table, write_report
from .run import run_recipe
from .stages import ArmResult, Check, Members, RecipeCheckError, RecipeResult, arm_labels
from .training import History, train

__all__ = [
    "ArmResult",
    "Check",
    "CheckConfig",
    "DistillConfig",
    "EvaluationConfig",
    "History",
    "Members",
    "ModelConfig",
    "RecipeCheckError",
    "RecipeConfig",
    "RecipeResult",
    "Reload",
    "ReloadError",
    "TrainConfig",
    "arm_labels",
    "load_recipe",
    "raise_for_failed_checks",
    "reload_without_ummrm",
    "result_table",
    "run_recipe",
    "shipped_recipes",
    "train",
    "write_report",
]
