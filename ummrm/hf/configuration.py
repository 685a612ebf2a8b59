"""What ummrm adds to a stock configuration, and how a checkpoint describes itself.

Everything here is plain data in config.json: `umm*` keys, one format version for all of them. Which configuration
classes there are is `registry.py`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from transformers import PreTrainedConfig

from ..config import MergeConfig, UpcycleConfig
from ..version import __version__
from .families import Family, known_family
from .generated import Generated
from .parallel import ep_plan, fsdp_plan, tp_plan

PREFIX = "umm_"
PHASES = ("mixture", "merging")
# Raised when a reader of the version before would misread or reject what is written.
FORMAT_VERSION = 1
OLDEST_FORMAT = 1  # that this version still reads
KEYS = (
    *("umm", "umm_phase", "umm_merge", "umm_base_model", "umm_family", "umm_code"),
    *("umm_format_version", "umm_version"),
)


if TYPE_CHECKING:

    class _Stock(PreTrainedConfig):
        """What the mixin is mixed into, and what each class that is made of it holds."""

        umm_stock: ClassVar[type[PreTrainedConfig]]

else:
    _Stock = object


class UmmConfigMixin(Generated, _Stock):
    """The part of a configuration that ummrm adds to the stock one.

    In config.json stand, beside these, `umm_format_version` and `umm_version` (of the ummrm that wrote it).

    Attributes:
        umm: `UpcycleConfig.to_dict()`.
        umm_phase: `"mixture"` (experts and routers are trained) or `"merging"` (frozen experts, learnable merge).
        umm_merge: `MergeConfig.to_dict()` in the merge phase.
        umm_base_model: name or path of the dense model that was upcycled, where it had one.
        umm_family: `Family.to_dict()` of a row that is not in this version's families.py: it was found by structure, or
            registered at run time.
        umm_code: `auto_map` of a dense model that came with code of its own (see `remote_code.py`).
    """

    umm = None
    umm_phase = "mixture"
    umm_merge = None
    umm_base_model = None
    umm_family = None
    umm_code = None

    @property
    def upcycle_config(self) -> UpcycleConfig:
        """The validated `UpcycleConfig`.

        Raises:
            ValueError: the configuration has none (a checkpoint that ummrm did not write), or it is malformed.
        """
        if not isinstance(self.umm, dict):
            raise ValueError(
                f"this {type(self).__name__} has no `umm` section, so it was not written by ummrm; load the dense "
                "model with its own transformers class and call ummrm.upcycle(model, UpcycleConfig(...))."
            )
        if self.umm_phase not in PHASES:
            raise ValueError(f"config.umm_phase must be one of {', '.join(PHASES)}, got {self.umm_phase!r}.")
        return UpcycleConfig.from_dict(self.umm)

    @property
    def merge_config(self) -> MergeConfig | None:
        """The validated `MergeConfig` of the merge phase, None in the mixture phase."""
        if self.umm_phase != "merging":
            return None
        if not isinstance(self.umm_merge, dict):
            raise ValueError(f"config.umm_merge must hold the MergeConfig of a merge phase, got {self.umm_merge!r}.")
        return MergeConfig.from_dict(self.umm_merge).resolved(self.upcycle_config)

    @property
    def umm_row(self) -> Family:
        """The family's row that this model's tensors were named by.

        A row in the configuration wins over one of families.py and over a registered one: a checkpoint must be read as
        it was written, whatever has been learned about its architecture since.

        Raises:
            ValueError: there is no row anywhere, or the configuration's is malformed or of another `model_type`.
        """
        model_type = self.model_type.removeprefix(PREFIX)
        if self.umm_family is not None:
            row = Family.from_dict(self.umm_family)
            if row.model_type != model_type:
                raise ValueError(
                    f"config.umm_family must be a row of {model_type!r}, got one of {row.model_type!r}; the "
                    "configuration was edited, or belongs to another model."
                )
            return row
        row = known_family(model_type)
        if row is None:
            raise ValueError(
                f"config.umm_family must hold the row of {model_type!r}, which ummrm {__version__} has none for, and "
                f"holds nothing; register it first: ummrm.register_family(Family({model_type!r}, ...))."
            )
        return row

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """The stock plan without the dense projections, which are no longer there."""
        plan = super().base_model_tp_plan
        if not isinstance(self.umm, dict):
            return plan
        return tp_plan(self.umm_row, plan, self.upcycle_config.has_linear_experts)

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """Whole routed experts on each rank; none in the merge phase, which folds all of a layer."""
        if not isinstance(self.umm, dict) or self.umm_phase != "mixture":
            return None
        return ep_plan(self.umm_row)

    @property
    def base_model_fsdp_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """The stock plan, with the layers by the name that the family has for them."""
        plan = getattr(super(), "base_model_fsdp_plan", None)  # not in every version
        return fsdp_plan(self.umm_row, plan) if isinstance(self.umm, dict) else plan

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, for a configuration whose format this version reads.

        Raises:
            ValueError: it does not; says which version to install. Or a section is malformed.
        """
        check_format(config_dict)
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        if config.umm is not None:
            config.upcycle_config, config.merge_config, config.umm_row  # noqa: B018  before any weight is read
        return made

    def to_dict(self) -> dict:
        """As in transformers, with what says who can read it."""
        described = super().to_dict()
        if self.umm is not None:
            described |= {"umm_format_version": FORMAT_VERSION, "umm_version": __version__}
        return described


def check_format(data: Mapping[str, object]) -> None:
    """Raises ValueError unless this version reads the checkpoint that `data`, its config.json, describes.

    One that has no section of ours passes: that it is no upcycled model is said where a model is made of it.
    """
    if data.get("umm") is None:
        return
    found, writer = data.get("umm_format_version"), data.get("umm_version")
    known = isinstance(writer, str) and re.fullmatch(r"\d[\w.+!-]*", writer)
    by = f"ummrm {writer}" if known else "an unknown version of ummrm"
    ours = f"ummrm {__version__}, which is installed, reads"
    ours += (
        f" format {FORMAT_VERSION}"
        if OLDEST_FORMAT == FORMAT_VERSION
        else f" formats {OLDEST_FORMAT} to {FORMAT_VERSION}"
    )
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(
            f"`umm_format_version` in config.json must be the checkpoint format that {by} wrote, a positive integer, "
            f"got {found!r}; the file was edited, or written before formats had numbers. Upcycle the dense model again."
        )
    if found > FORMAT_VERSION:
        remedy = f"install that version or a newer one: pip install 'ummrm>={writer}'" if known else "upgrade ummrm"
        raise ValueError(f"this checkpoint was written by {by} in format {found}; {ours}. To read it, {remedy}.")
    if found < OLDEST_FORMAT:
        remedy = f"install that version: pip install 'ummrm=={writer}'" if known else "install an older ummrm"
        raise ValueError(f"this checkpoint was written by {by} in format {found}; {ours}. To read it, {remedy}.")
