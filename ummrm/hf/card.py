"""The model card of a merged model: where it came from, what it was merged with, and how it did.

Text only. `merge` makes it, `saving` writes it beside the weights, `trainer` adds what it knows about the training.
What comes from a configuration or a metric may be a stranger's: it is quoted, and can neither add to the front matter
nor leave its cell.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from ..nn.dense import PROJECTIONS

FILE = "README.md"
_MARK = "<!-- card written by ummrm; remove this line to keep your own text at the next save -->"
# by `experts_in`, which a mixture assigned by token has none of
_EXPERTS = {
    "None": "feed-forward layers",
    "ffn": "feed-forward layers",
    "linear": "linear layers",
    "all": "linear layers and the reward head",
}
# beside the models, so that a merged model has nothing of ours in it
_REMEMBERED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def merged_card(
    model_class: str,
    base_model: str | None,
    upcycling: Mapping[str, object],
    merging: Mapping[str, object],
    coefficients: Mapping[str, Tensor],
    num_shared: int,
    notes: str = "",
) -> str:
    """The card of a merged model.

    Args:
        model_class: name of its stock class.
        base_model: name or path of the dense model that was upcycled, if known.
        upcycling: `UpcycleConfig.to_dict()`.
        merging: `MergeConfig.to_dict()`.
        coefficients: FFN name to merge coefficients [projections, S + E], shared experts first.
        num_shared: S.
        notes: Markdown about training data and metrics, put in as it is.
    """
    on_hub = _is_on_hub(base_model)
    tag, loader = _task(model_class)
    reward = tag == "text-classification"
    kind = "reward model" if reward else "model"
    experts = _EXPERTS[str(upcycling.get("experts_in"))]
    routed = [matrix[:, num_shared:] for matrix in coefficients.values()]
    learned = merging.get("learn_shared_share") or any((m != m[:, :1]).any() for m in routed)
    weights = "learned" if learned else "equal"
    header = ModelCardData(  # leaves out what is None
        library_name="transformers",
        pipeline_tag=tag,
        base_model=base_model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        tags=["reward-model", "ummrm"] if reward else ["ummrm"],
    ).to_yaml()
    text = f"""---
{header.strip()}
---
{_MARK}

# Merged {kind}

A dense {_code(model_class)}, merged from a mixture of experts by UMM-RM ([arXiv 2512.00724](https://arxiv.org/abs/2512.00724)):
the {experts} of {base_model_text(base_model, kind)} became experts, the mixture was
trained{" on preference pairs" if reward else ""}, and its experts were folded back with {weights} weights.
It loads with transformers alone:

```python
from transformers import {loader}

model = {loader}.from_pretrained("path/of/this/folder")
```

## How it was made

{_table(("upcycling", "value"), upcycling.items())}

{_table(("merging", "value"), merging.items())}

## Merge weights

{_weights(coefficients, num_shared)}
"""
    return text + (f"\n{notes.strip()}\n" if notes.strip() else "")


def remember(model: nn.Module, text: str) -> None:
    """Keeps the card of a model for as long as the model lives; a copy of the model has none."""
    _REMEMBERED[model] = text


def recall(model: nn.Module) -> str | None:
    """The card that was kept for a model, or None."""
    return _REMEMBERED.get(model)


def of_folder(folder: str) -> str | None:
    """The card that ummrm wrote into a folder, or None."""
    path = Path(folder) / FILE
    if not folder or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if _MARK in text else None


def with_notes(text: str | None, model_class: str, notes: str) -> str:
    """A card with further notes at its end; without a card, a short one.

    Args:
        text: the card, or None.
        model_class: name of the model's class.
        notes: Markdown, put in as it is; it replaces notes under the same first heading.
    """
    if text is None:
        tag, loader = _task(model_class)
        header = ModelCardData(library_name="transformers", pipeline_tag=tag, tags=["reward-model", "ummrm"]).to_yaml()
        text = f"""---
{header.strip()}
---
{_MARK}

# Distilled reward model

A dense {_code(model_class)}, which `{loader}.from_pretrained` of transformers loads.
"""
    heading = notes.strip().splitlines()[0]
    return f"{text.partition(f'{chr(10)}{heading}{chr(10)}')[0].rstrip()}\n\n{notes.strip()}\n"


def base_model_text(base_model: str | None, kind: str = "reward model") -> str:
    """How a card names the dense model: a folder of some machine by its last part alone."""
    if not base_model:
        return f"a dense {kind}"
    return _code(Path(base_model).name if _is_local(base_model) else base_model)


def _task(model_class: str) -> tuple[str | None, str]:
    """The hub's name of what models of a class do, where it is one of the usual, and the class that loads them."""
    if model_class.endswith("ForSequenceClassification"):
        return "text-classification", "AutoModelForSequenceClassification"
    if model_class in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "text-generation", "AutoModelForCausalLM"
    if model_class in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "fill-mask", "AutoModelForMaskedLM"
    return None, model_class


def _is_on_hub(base_model: str | None) -> bool:
    if not base_model or _is_local(base_model):
        return False
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return False
    return True


def _is_local(base_model: str) -> bool:
    return os.path.isabs(base_model) or base_model.startswith(".") or os.path.isdir(base_model)


def write(folder: str | os.PathLike, text: str, previous: str | os.PathLike) -> None:
    """Writes the card into `folder`, unless `previous`, the folder that it replaces, holds a card of someone else."""
    old = Path(previous) / FILE
    if old.is_file() and _MARK not in old.read_text(encoding="utf-8", errors="replace"):
        return
    (Path(folder) / FILE).write_text(text, encoding="utf-8")


def settings_table(settings: Mapping[str, object]) -> str:
    """Markdown of named settings."""
    return _table(("training", "value"), settings.items())


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Markdown of named numbers."""
    return _table(("metric", "value"), ((name, f"{value:.4g}") for name, value in metrics.items()))


def _weights(coefficients: Mapping[str, Tensor], num_shared: int) -> str:
    num_routed = next(iter(coefficients.values())).shape[1] - num_shared
    columns = [f"shared {i}" for i in range(num_shared)] + [f"expert {i}" for i in range(num_routed)]
    rows = []
    for name, matrix in coefficients.items():
        names = PROJECTIONS[-len(matrix) :]
        if (matrix == matrix[0]).all():
            names, matrix = ("",), matrix[:1]
        for projection, row in zip(names, matrix.tolist(), strict=True):
            rows.append((f"{name} {projection}".strip(), *(f"{c:.4f}" for c in row)))
    return _table(("layer", *columns), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    """Text of a table's cell: on one line, and with nothing that Markdown or HTML would read as more than text."""
    return re.sub(r"([\\|`<\[])", r"\\\1", _line(str(value)))


def _code(text: str) -> str:
    """A code span of any text: on one line, fenced by more backticks than it holds in a row."""
    text = _line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
