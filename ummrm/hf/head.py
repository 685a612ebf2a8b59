"""Which module a reward model's scores come from: the linear map to one output outside its backbone.

Dense or upcycled, in either phase. How a fresh one is drawn is `reward_head.py`'s business.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..nn.merging_linear import MergingLinear
from ..nn.upcycled_linear import UpcycledLinear


def gives_scores(model_class: type[nn.Module]) -> bool:
    """Whether models of a class, stock or ours, have a head that gives one row of logits for each sequence."""
    return model_class.__name__.endswith("ForSequenceClassification")


def maps_to_one(model: PreTrainedModel) -> list[str]:
    """Names of the linear maps to one output outside a model's backbone, those of experts too."""
    backbone = set(model.base_model.modules()) if model.base_model is not model else set()
    return [name for name, m in model.named_modules() if m not in backbone and _outputs(m) == 1]


def _outputs(module: nn.Module) -> int | None:
    if isinstance(module, (nn.Linear, UpcycledLinear)):
        return module.out_features
    return module.expert_weight.shape[1] if isinstance(module, MergingLinear) else None


def head_name(model: PreTrainedModel) -> str:
    """Name of the last linear map of a reward model's head, of which `experts_in="all"` makes experts.

    Raises:
        ValueError: the model gives no score, or several numbers, for a sequence, or its head does not end so.
    """
    name, labels = type(model).__name__, model.config.num_labels
    asked = '`experts_in` must be "ffn" or "linear" for a model'
    if not gives_scores(type(model)):
        raise ValueError(
            f'{asked} without a reward head, got "all" for a {name}; give a reward model, or start a head: '
            "ummrm.upcycle(model, config, new_head=True)."
        )
    if labels != 1:
        raise ValueError(
            f'{asked} that gives several numbers for a sequence, got "all" for a {name} with num_labels={labels}; load '
            "it with num_labels=1."
        )
    found = maps_to_one(model)
    if len(found) != 1:
        raise ValueError(
            f'{asked} that does not end in one linear map to one output beside its backbone, got "all" for a {name}, '
            f"which has {len(found)}; its head is then shared by all members."
        )
    return found[0]
