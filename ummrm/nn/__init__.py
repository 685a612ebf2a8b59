"""Modules for any PyTorch network: experts, router, upcycled and merging FFN, their losses and routing statistics.

Nothing here knows Hugging Face. `UpcycledFFN.from_dense` makes a drop-in replacement of an FFN module; `ummrm.upcycle`
does it for a whole transformers model.
"""

from .assignment import RowGroups, assign_groups, draw_groups, members, set_evaluation
from .dense import FFNPaths
from .experts import Experts
from .losses import auxiliary_loss, preference_loss
from .merging_ffn import MergingFFN
from .merging_linear import MergingLinear
from .router import Router
from .routing_statistics import RoutingStatistics, record_routing_statistics
from .upcycled_ffn import UpcycledFFN
from .upcycled_linear import UpcycledLinear

__all__ = [
    "Experts",
    "FFNPaths",
    "MergingFFN",
    "MergingLinear",
    "Router",
    "RoutingStatistics",
    "RowGroups",
    "UpcycledFFN",
    "UpcycledLinear",
    "assign_groups",
    "auxiliary_loss",
    "draw_groups",
    "members",
    "preference_loss",
    "record_routing_statistics",
    "set_evaluation",
]
