"""Writes docs/configuration.md from the dataclasses: every field that a user may set, its type, default and meaning.

    python tools/configuration_reference.py          writes the page
    python tools/configuration_reference.py --check  says whether it is what the code gives

Meanings are those of the docstrings, defaults those that the classes resolve to. What a recipe's block passes on to TRL
or peft is named, not listed: those arguments are theirs and differ between versions.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path

from ummrm import MergeConfig, UmmDistillConfig, UmmMergeConfig, UpcycleConfig
from ummrm.config import ASSIGNMENTS
from ummrm.data import PairsConfig, PairSource
from ummrm.evaluation import EvaluationConfig
from ummrm.pipeline import ModelSource, Recipe, adapters, arguments

PAGE = Path(__file__).resolve().parent.parent / "docs/configuration.md"
WIDTH = 140

# annotations of fields, as one who writes YAML or Python knows their values
TYPES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "true, false",
    "str | None": "text, none",
    "int | None": "integer, none",
    "float | None": "number, none",
    "str | int": "text, integer",
    "str | int | Sequence[int]": "text, integer, integers",
    "tuple[str, ...]": "texts",
    "tuple[str, str] | None": "two texts, none",
    "Mapping[str, str]": "mapping",
    "Mapping[str, Any]": "mapping",
    "Mapping[str, Any] | None": "mapping, true, false",
    "ModelSource": "text, mapping",
    "PairsConfig": "text, mapping, list",
    "tuple[PairSource, ...]": "source, list of them",
}


def meanings(cls):
    """The text of each entry of a docstring's `Attributes`; for own fields without one that of `metadata["help"]`."""
    _, _, rest = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found, name = {}, None
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif line.strip() and name:
            found[name] += f" {line.strip()}"
    for one in dataclasses.fields(cls):
        if one.name not in found and one.name in cls.__annotations__ and "help" in one.metadata:
            found[one.name] = one.metadata["help"]
    return found


def own_fields(cls):
    """The fields that a class itself declares, with what the docstring says of each.

    Raises:
        ValueError: a field without a meaning, or a meaning without a field; names it.
    """
    fields = [one for one in dataclasses.fields(cls) if one.name in cls.__annotations__]
    said = meanings(cls)
    wrong = sorted({one.name for one in fields} ^ said.keys())
    if wrong:
        raise ValueError(f"{cls.__name__}: `Attributes` must describe each field and nothing else; see {wrong[0]}.")
    return [(one, said[one.name]) for one in fields]


def kind_of(cls, field):
    """The type of a field in words.

    Raises:
        ValueError: TYPES has no words for its annotation.
    """
    annotation = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    if annotation not in TYPES:
        raise ValueError(f"{cls.__name__}.{field.name}: TYPES must have words for {annotation!r}; add them.")
    return TYPES[annotation]


def shown(value):
    """A value as YAML has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, dict):
        return "empty" if not value else str(value)
    return f"`{value}`"


def default_of(field):
    """A field's default as YAML has it."""
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return shown(field.default_factory())
    return "required"


def table(head, rows):
    """A Markdown table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


def field_table(cls, defaults=None, columns=("default",)):
    """A class's fields.

    Args:
        cls: the dataclass.
        defaults: texts of `columns`, by field, in the place of the class's own default.
        columns: heads of the defaults.
    """
    rows = []
    for field, meaning in own_fields(cls):
        told = (defaults or {}).get(field.name, default_of(field))
        rows.append([f"`{field.name}`", kind_of(cls, field), *([told] if isinstance(told, str) else told), meaning])
    return table(["field", "type", *columns, "meaning"], rows)


def paragraph(text):
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def recipe(**blocks):
    return Recipe.from_dict({"model": "m", "data": "d.jsonl", "output": "o", **blocks})


def by_assignment(of):
    """What `of(recipe)` gives by sequence, which is a recipe's default, and by token."""
    return of(recipe()), of(recipe(upcycle={"assignment": "token"}))


def recipe_defaults():
    optional = {"dense": shown(recipe().dense is not None), "lora": shown(recipe().lora is not None)}
    by_sequence, by_token = by_assignment(lambda made: made.distill is not None)
    return {**optional, "distill": f"{shown(by_sequence)}, by token {shown(by_token)}"}


def upcycle_defaults():
    given = {kind: UpcycleConfig(assignment=kind).to_dict() for kind in ASSIGNMENTS}
    found = {}
    for field, _ in own_fields(UpcycleConfig):
        values = [shown(given[kind][field.name]) if field.name in given[kind] else "–" for kind in ASSIGNMENTS]
        found[field.name] = [default_of(field)] * 2 if field.name == "assignment" else values
    return found


def evaluate_defaults():
    """A recipe's own: by the seed that it has, and by what it says otherwise than the class."""
    made = recipe(seed=7).evaluation_config()
    plain = EvaluationConfig()
    found = {}
    for field, _ in own_fields(EvaluationConfig):
        own, there = getattr(plain, field.name), getattr(made, field.name)
        found[field.name] = [shown(own), "the recipe's `seed`" if there == 7 else shown(there)]
    return found


def pairs_defaults():
    return {"seed": "the recipe's `seed`"} if recipe(seed=7).data.seed == 7 else {}


def stage_table():
    """Which blocks pass arguments on, to what, and what else may stand in them."""
    kinds = {"training": arguments.RewardConfig, **arguments.KINDS}
    rows = []
    for block in (field.name for field in dataclasses.fields(Recipe) if field.type.startswith("Mapping")):
        if block in kinds:
            kind = kinds[block]
            name = f"`trl.{kind.__name__}`" if kind.__module__.startswith("trl.") else f"`ummrm.{kind.__name__}`"
            passes, beside = f"yes: those of {name}", arguments.BESIDE.get(block, ())
        else:
            passes, beside = "no", ()
        passes = "no; those of `peft.LoraConfig`" if block == "lora" else passes
        rows.append([f"`{block}`", passes, ", ".join(f"`{name}`" for name in beside) or "–"])
    return table(["block", "TRL's arguments pass through", "beside them"], rows)


def named(names):
    return ", ".join(f"`{name}`" for name in names)


def page():
    """The page's text.

    Raises:
        ValueError: a field that is not described, or whose type has no words.
    """
    longer = {
        name: recipe(**blocks).longer(recipe(**blocks).upcycle_config(fresh=fresh))
        for name, blocks, fresh in (
            ("fresh", {}, True),
            ("trained", {}, False),
            ("token", {"upcycle": {"assignment": "token"}}, True),
        )
    }
    shared = recipe(upcycle={"num_shared_experts": 1}).upcycle_config(fresh=True).experts_in
    fresh, trained = (recipe().upcycle_config(fresh=one).experts_in for one in (True, False))
    by_sequence, by_token = by_assignment(lambda made: made.merge_weights)
    parts = [
        "# Configuration",
        paragraph(
            """Every field of a recipe and of the configurations that it is made of. This page is written by
            `python tools/configuration_reference.py` from the dataclasses and their docstrings; what a run does with a
            recipe stands in [recipes.md](recipes.md). A name that is no field is an error that names the nearest one.
            `none` is `null` in YAML and `None` in Python."""
        ),
        "## The recipe",
        "`ummrm run` reads one as YAML, `ummrm.pipeline.Recipe.from_dict` as plain data.",
        field_table(Recipe, recipe_defaults()),
        "## Arguments of the stages",
        paragraph(
            f"""A stage takes its own block before `training`, and `training` before a run's defaults. What `training`
            says of {named(arguments.REWARD_MODELS_ALONE)} holds for `dense` and `train` alone. Where `train` says
            nothing of its length, it is that of `training` times {longer["fresh"]} from a fresh reward head, times
            {longer["trained"]} from a trained one, times {longer["token"]} by token or with experts in FFNs alone."""
        ),
        stage_table(),
        paragraph(
            f"""A run decides {named(arguments.OURS)} of TRL's arguments, and {named(adapters.OURS)} of
            `peft.LoraConfig`; giving one is an error. Arguments of training in `merge` need learned weights. A run's
            defaults, where TRL's are others:"""
        ),
        table(
            ["argument", "in a run"],
            [
                *([f"`{name}`", shown(value)] for name, value in arguments.DEFAULTS.items()),
                *(
                    [f"`{name}`", f"{shown(value)} without an accelerator"]
                    for name, value in arguments.WITHOUT_ACCELERATOR.items()
                ),
            ],
        ),
        "## `model`",
        "A text is its `path`.",
        field_table(ModelSource),
        "## `data`",
        "A text, or a list, is `train`. The fields of a single source may stand in `data` itself.",
        field_table(PairsConfig, pairs_defaults()),
        "A source; a text is its `path`:",
        field_table(PairSource),
        "## `upcycle`",
        paragraph(
            f"""The fields of `ummrm.UpcycleConfig`. In a recipe `assignment` is
            {shown(recipe().upcycle_config(fresh=True).assignment)} where nothing is said, and `experts_in` is
            {shown(fresh)} under a fresh reward head, {shown(trained)} under a trained one, {shown(shared)} with shared
            experts. A field with – in a column belongs to the other assignment, and giving it is an error."""
        ),
        field_table(UpcycleConfig, upcycle_defaults(), ("by token", "by sequence")),
        "## `merge`",
        paragraph(
            f"""`weights` is `mean` or `learned`; {shown(by_sequence)} where nothing is said, by token
            {shown(by_token)}. Beside it the fields of `ummrm.MergeConfig`:"""
        ),
        field_table(MergeConfig),
        "and, where weights are learned, the arguments of `ummrm.UmmMergeConfig`: TRL's with another default.",
        field_table(UmmMergeConfig),
        "## `distill`",
        paragraph(
            """`texts` names sources of texts without labels: one, or a list; the training answers where nothing is
            said. Beside it the arguments of `ummrm.UmmDistillConfig`, which are TRL's and these:"""
        ),
        field_table(UmmDistillConfig),
        "## `evaluate`",
        "The fields of `ummrm.evaluation.EvaluationConfig`.",
        field_table(EvaluationConfig, evaluate_defaults(), ("default", "in a recipe")),
    ]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page differs")
    made = page()
    if not parser.parse_args().check:
        PAGE.write_text(made, encoding="utf-8")
        print(f"{PAGE} is written")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit(f"{PAGE} is not what the code gives; run python tools/configuration_reference.py")


if __name__ == "__main__":
    main()
