"""ummrm: upcycle a dense reward model into a mixture of experts, train it, merge it back into one dense model.

The method is UMM-RM (arXiv 2512.00724). `upcycle`, `prepare_merge` and `merge` serve whole Hugging Face models;
`UpcycledFFN.from_dense` serves any other network. Importing this package registers the upcycled model classes with
transformers' Auto classes.
"""

from .config import MergeConfig, UpcycleConfig
from .hf import experts_interface as _experts_interface
from .hf.families import Family
from .hf.normalization import (
    RewardNormalization,
    fold_reward_normalization,
    measure_rewards,
    reward_normalization,
    score,
    set_reward_normalization,
)
from .hf.registry import register_family
from .hf.saving import save_pretrained
from .merge import merge, merge_coefficients, prepare_merge
from .nn.dense import FFNPaths
from .nn.assignment import assign_groups, draw_groups, members, set_evaluation
from .nn.losses import auxiliary_loss, preference_loss
from .nn.merging_ffn import MergingFFN
from .nn.routing_statistics import record_routing_statistics
from .nn.upcycled_ffn import UpcycledFFN
from .ops.backends import use_backend
from .ops.library import check
from .upcycle import upcycle
from .version import __version__ as __version__

_experts_interface.register()

__all__ = [
    "FFNPaths",
    "Family",
    "MergeConfig",
    "MergingFFN",
    "RewardNormalization",
    "UpcycleConfig",
    "UpcycledFFN",
    "assign_groups",
    "auxiliary_loss",
    "check",
    "draw_groups",
    "fold_reward_normalization",
    "measure_rewards",
    "members",
    "merge",
    "merge_coefficients",
    "prepare_merge",
    "preference_loss",
    "record_routing_statistics",
    "register_family",
    "reward_normalization",
    "save_pretrained",
    "score",
    "set_evaluation",
    "set_reward_normalization",
    "upcycle",
    "use_backend",
]

# Not in __all__: a star import must not need TRL.
_TRAINERS = ("UmmMergeConfig", "UmmMergeTrainer", "UmmRewardTrainer")
_TRAINER_NEEDS = ("trl", "datasets", "accelerate", "peft")


def __getattr__(name: str):
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import trainer
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _TRAINER_NEEDS:
            raise
        raise ModuleNotFoundError(
            f"ummrm.{name} needs {error.name}, which is not installed; run: pip install 'ummrm[trl]'", name=error.name
        ) from error
    return getattr(trainer, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRAINERS})
