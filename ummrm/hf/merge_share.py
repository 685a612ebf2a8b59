"""The fixed lambda of a Hugging Face model stands twice, in its weights and in `config.umm_merge`; here they agree.

In memory the tensor says what lambda is, and the configuration follows it at every load and save. A folder in which
the two differ was not written by ummrm and is refused. What lambda does is `nn/merging_ffn.py`'s business.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.merge_weights import MergeShare

SHARE_NAME = "umm_merge_share"


def merge_share(model: nn.Module) -> MergeShare | None:
    """The lambda of a model in its merge phase; None in the mixture phase."""
    return next((module for module in model.modules() if isinstance(module, MergeShare)), None)


def follow_share(model: Any) -> None:
    """Writes the lambda that a model's tensor holds into its configuration."""
    share = merge_share(model)
    if share is not None and not _is_meta(share):
        model.config.umm_merge = share.merge_config.to_dict()


def check_share(model: Any, origin: object) -> None:
    """Raises ValueError if the lambda just loaded from `origin` is not the configuration's."""
    share = merge_share(model)
    if share is None or _is_meta(share):
        return
    told, held = model.config.merge_config.shared_share, share.shared_share()
    if held != told:
        raise ValueError(
            f"{origin}: the lambda of the merge must be one number, and is shared_share={told!r} in config.json and "
            f"{held!r} in its weights ({SHARE_NAME}.share); write {held!r} into config.json, and set the tensor of the "
            "loaded model to the lambda that you want."
        )


def _is_meta(share: MergeShare) -> bool:
    return any(tensor.is_meta for tensor in (*share.parameters(), *share.buffers()))
