"""TRL's RewardTrainer for both phases of UMM-RM and for distillation; needs the extra `ummrm[trl]`.

Exported lazily as `ummrm.UmmRewardTrainer`, `ummrm.UmmMergeTrainer`, `ummrm.distill` and so on, so that the core does
not import TRL.
"""

from .distillation import UmmDistillConfig, UmmDistillTrainer, distill
from .merging import UmmMergeConfig, UmmMergeTrainer
from .reward import UmmRewardTrainer

__all__ = [
    "UmmDistillConfig",
    "UmmDistillTrainer",
    "UmmMergeConfig",
    "UmmMergeTrainer",
    "UmmRewardTrainer",
    "distill",
]
