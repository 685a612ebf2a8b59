"""The main job as a library: train a dense reward model, upcycle, train, learn merge weights, merge, export, reload.

`run_recipe(load_recipe("demo"), "out")` runs it, `write_report` writes tables and plots. Needs the extra `ummrm[lab]`;
the product does not know this package.
"""

from .config import CheckConfig, EvaluationConfig, ModelConfig, RecipeConfig, TrainConfig, load_recipe, shipped_recipes
from .reload import Reload, ReloadError, reload_without_ummrm
from .report import raise_for_failed_checks, result_table, write_report
from .run import RecipeResult, run_recipe
from .stages import ARMS, ArmResult, Check, RecipeCheckError
from .training import History, train

__all__ = [
    "ARMS",
    "ArmResult",
    "Check",
    "CheckConfig",
    "EvaluationConfig",
    "History",
    "ModelConfig",
    "RecipeCheckError",
    "RecipeConfig",
    "RecipeResult",
    "Reload",
    "ReloadError",
    "TrainConfig",
    "load_recipe",
    "raise_for_failed_checks",
    "reload_without_ummrm",
    "result_table",
    "run_recipe",
    "shipped_recipes",
    "train",
    "write_report",
]
