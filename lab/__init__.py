"""The reward-hacking laboratory: does an upcycled and merged reward model resist over-optimisation, and at what cost?

`run_study(load_study("cpu"), "out")` trains every arm over regimes and seeds and measures it under best-of-n and PPO;
`write_report("out")` makes of the tables what people read. Runs from a checkout as `python -m lab`, needs the
extra `ummrm[lab]`, and uses the product as any user does; the product does not know it.
"""

from .checkpoint_config import CheckpointTaskConfig
from .config import ArmConfig, ComparisonConfig, MeasureConfig, RegimeConfig, StudyConfig
from .online import OnlineConfig
from .report import report_lines, study_tables, write_report
from .run import run_study
from .studies import load_study, shipped_studies
from .workers import StudyError

__all__ = [
    "ArmConfig",
    "ComparisonConfig",
    "MeasureConfig",
    "OnlineConfig",
    "CheckpointTaskConfig",
    "RegimeConfig",
    "StudyConfig",
    "StudyError",
    "load_study",
    "report_lines",
    "run_study",
    "shipped_studies",
    "study_tables",
    "write_report",
]
