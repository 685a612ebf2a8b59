"""TRL's RewardTrainer for both phases of UMM-RM; needs the extra `ummrm[trl]`.

Exported lazily as `ummrm.UmmRewardTrainer` and `ummrm.UmmMergeTrainer`, so that the core does not import TRL.
"""

from .merging import UmmMergeTrainer
from .reward import UmmRewardTrainer

__all__ = ["UmmMergeTrainer", "UmmRewardTrainer"]
