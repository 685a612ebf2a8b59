"""Modules for any PyTorch network: experts, router, upcycled and merging FFN, their losses and routing statistics.

Nothing here knows Hugging Face. `UpcycledFFN.from_dense` makes a drop-in replacement of an FFN module; `ummrm.upcycle`
does it for a whole transformers model.
"""

from .dense import FFNPaths
from .experts import Experts
from .losses import auxiliary_loss, preference_loss
from .merging_ffn import MergingFFN
from .router import Router
from .routing_statistics import RoutingStatistics, record_routing_statistics
from .upcycled_ffn import UpcycledFFN

__all__ = [
    "Experts",
    "FFNPaths",
    "MergingFFN",
    "Router",
    "RoutingStatistics",
    "UpcycledFFN",
    "auxiliary_loss",
    "preference_loss",
    "record_routing_statistics",
]
