"""The table of docs/recipes.md: what each recipe for a model of the hub takes, by the plan's own code, from the model's
configuration in recipes/configs. Run as a program it prints the table.
"""

import json
import re
from pathlib import Path

from checkout import ROOT
from transformers import CONFIG_MAPPING

from ummrm.pipeline import read_recipe
from ummrm.pipeline.run import every_argument, plan_stages

HEAD = (
    "recipe",
    "stage",
    "parameters",
    "trained",
    "TFLOPs a step",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "memory",
)


def recipes():
    """The recipes for models of the hub."""
    return [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.name != "demo.yaml"]


def configuration(model):
    """Of a hub model, from the copy in recipes/configs."""
    fields = json.loads((ROOT / "recipes/configs" / f"{model.rpartition('/')[2]}.json").read_text())
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def devices(path):
    """How many the command in a recipe's first lines starts."""
    found = re.search(r"--num_processes (\d+)", path.read_text())
    return int(found[1]) if found else 1


def plans(path):
    """Of each stage what it takes in steps whose texts all have as many tokens as the recipe lets them have."""
    recipe = read_recipe(path)
    upcycle = recipe.upcycle_config(fresh=True)
    arguments = every_argument(recipe, upcycle, Path("stages"))
    count, given = devices(path), arguments["train"]
    rows = given.per_device_train_batch_size * given.gradient_accumulation_steps * count
    sizes = {"pairs": rows, "texts": rows, "lengths": [given.max_length], "devices": count}
    return plan_stages(recipe, configuration(recipe.model.path), upcycle, arguments, **sizes)


def rows():
    for path in recipes():
        count = devices(path)
        name = f"[{path.stem}](../recipes/{path.name})" + (f", each of {count} devices" if count > 1 else "")
        for one in plans(path):
            parts = (one.weights, one.gradients, one.optimizer, one.activations, one.memory)
            flops = f"{one.flops / one.steps / 1e12:,.0f}"
            sizes = (f"{part / 1e9:,.1f}" for part in parts)
            yield (name, one.stage, counted(one.parameters), counted(one.trained), flops, *sizes)
            name = ""


def counted(number):
    return f"{number:,}" if number < 1e4 else f"{number / 1e6:,.1f} M" if number < 1e8 else f"{number / 1e6:,.0f} M"


def table():
    lines = [HEAD, ("---", "---", *("---:" for _ in HEAD[2:])), *rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table())
