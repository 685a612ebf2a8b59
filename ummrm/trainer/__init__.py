"""TRL's RewardTrainer for both phases of UMM-RM; needs the extra `ummrm[trl]`.

Exported lazily as `ummrm.UmmRewardTrainer`, `ummrm.UmmMergeTrainer` and `ummrm.UmmMergeConfig`, so that the core does
not import TRL.
"""

from .merging import UmmMergeConfig, UmmMergeTrainer
from .reward import UmmRewardTrainer

__all__ = ["UmmMergeConfig", "UmmMergeTrainer", "UmmRewardTrainer"]
