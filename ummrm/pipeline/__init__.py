"""The whole job from one recipe: pairs, dense control, upcycling, training, merge, distillation.

A recipe is a YAML file of one screen (`recipe.py`). Each stage (`stages.py`) leaves a model in a folder of its own and
a record of what it was made with (`record.py`), so that the same command goes on where an earlier one was cut off.
`plan.py` says beforehand what it will take. Needs `ummrm[run]`.
"""

from .alone import train_folder
from .plan import StagePlan
from .recipe import ModelSource, Recipe, RecipeError, read_recipe
from .run import Outcome, plan_recipe, run_recipe

__all__ = [
    "ModelSource",
    "Outcome",
    "Recipe",
    "RecipeError",
    "read_recipe",
    "StagePlan",
    "plan_recipe",
    "run_recipe",
    "train_folder",
]
