"""The model card of a merged model: where it came from, what it was merged with, and how it did.

Text only. `merge` writes it beside the weights at every save, `trainer` adds what it knows about the training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..nn.dense import PROJECTIONS

FILE = "README.md"
_MARK = "<!-- card written by ummrm; remove this line to keep your own text at the next save -->"


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
    header = ["---", "library_name: transformers", "pipeline_tag: text-classification"]
    if base_model and not _is_local(base_model):
        header += [f"base_model: {base_model}", "base_model_relation: finetune"]
    header += ["tags:", "- reward-model", "- ummrm", "---", _MARK]
    text = f"""
# Merged reward model

A dense `{model_class}`, merged from a mixture of experts by UMM-RM ([arXiv 2512.00724](https://arxiv.org/abs/2512.00724)):
the feed-forward layers of {base_model_text(base_model)} were copied into experts, the mixture was trained on preference
pairs, and its experts were folded back with learned weights. It loads with transformers alone:

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("path/of/this/folder")
```

## How it was made

{_table(("upcycling", "value"), upcycling.items())}

{_table(("merging", "value"), merging.items())}

## Merge weights

{_weights(coefficients, num_shared)}
"""
    return "\n".join(header) + "\n" + text + (f"\n{notes.strip()}\n" if notes.strip() else "")


def base_model_text(base_model: str | None) -> str:
    """How a card names the dense model: a folder of some machine by its last part alone."""
    if not base_model:
        return "a dense reward model"
    return f"`{Path(base_model).name if _is_local(base_model) else base_model}`"


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


def _table(head: tuple[str, ...], rows) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
