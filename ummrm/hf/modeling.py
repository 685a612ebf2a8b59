"""Upcycled models as real `PreTrainedModel` classes: what they add to a stock configuration and to a stock model.

A class is its stock class with the FFNs exchanged; the same class serves both phases (`config.umm_phase`). Which
classes there are is `registry.py`'s business, how the token mask reaches the FFNs `masks.py`'s, how tensors get in and
out `upcycle.py`'s and `merge.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as hf_init
from transformers.modeling_utils import _CAN_RECORD_REGISTRY

from ..nn.dense import is_linear
from ..nn.experts import Experts
from ..nn.merge_weights import MergeShare
from ..nn.merging_ffn import MergingFFN
from ..nn.merging_linear import MergingLinear, merging_parts
from ..nn.router import Router
from ..nn.upcycled_ffn import UpcycledFFN
from ..nn.upcycled_linear import UpcycledLinear
from . import loading, saving
from .configuration import UmmConfigMixin
from .families import Family
from .generated import Generated
from .head import gives_scores, head_name
from .masks import UmmLayerMixin, umm_inner_class, umm_layer_class
from .merge_share import SHARE_NAME, check_share, follow_share
from .parallel import balanced_shards, check_distributed, declare_plans
from .remote_code import copy_code
from .sequence import EVERY_MEMBER, by_sequence

if TYPE_CHECKING:

    class _Stock(PreTrainedModel):
        """What the mixin is mixed into."""

        config: Any
        config_class: Any
        base_model: Any
        from_pretrained: Any
        save_pretrained: Any
        _set_gradient_checkpointing: Any
        _no_split_modules: Any

else:
    _Stock = object


class UmmPreTrainedMixin(Generated, _Stock):
    """What every upcycled model class adds to its stock class.

    Attributes:
        stock_class: that class.
        family: the row that this model was built by.
        umm_passes_mask: the row's `passes_mask` in a backbone that is itself called with the attention mask, else None.
        umm_groups: by sequence: the groups of the call that is being run, where a head passes none on.
        umm_lower_layers: by sequence: how many layers below the first experts run once for all members.
        umm_head: by sequence: name of the reward head's last linear map where each expert has its own, else "".
    """

    stock_class: type[PreTrainedModel]
    family: Family
    umm_passes_mask: bool | None = None
    umm_groups: object = None
    umm_lower_layers = 0
    umm_head = ""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        if not isinstance(config, UmmConfigMixin):
            raise ValueError(
                f"`config` must be a {type(self).config_class.__name__} to build a {type(self).__name__}, got a "
                f"{type(config).__name__}; upcycle a dense model with ummrm.upcycle(model, UpcycleConfig(...))."
            )
        config.upcycle_config, config.merge_config  # noqa: B018  malformed sections fail before anything is built
        super().__init__(config, *args, **kwargs)
        install(self)
        freeze_for_merge(self)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises what a checkpoint lacks; called by transformers for every module."""
        if isinstance(module, Router):
            module.reset_parameters(normal_=hf_init.normal_, zeros_=hf_init.zeros_)
        elif isinstance(module, Experts):
            std = getattr(self.config, "initializer_range", 0.02)
            module.reset_parameters(std, normal_=hf_init.normal_, zeros_=hf_init.zeros_)
        elif isinstance(module, UpcycledLinear):
            std = getattr(self.config, "initializer_range", 0.02)
            module.reset_parameters(std, normal_=hf_init.normal_, zeros_=hf_init.zeros_)
        elif isinstance(module, (MergingFFN, MergingLinear)):
            hf_init.zeros_(module.alpha)
        elif isinstance(module, MergeShare):
            module.reset_parameters(constant_=hf_init.constant_)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable=True, gradient_checkpointing_func: Callable | None = None, **kwargs
    ):
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "`use_reentrant` must be False for an upcycled model: reentrant checkpointing runs the forward without "
                'autograd, which cuts the routers\' auxiliary losses off. Pass {"use_reentrant": False}.'
            )
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, **kwargs)

    def member_scores(self, *args: Any, **kwargs: Any) -> Tensor:
        """Every member's scores of a batch, for a reward model assigned by sequence in its mixture phase.

        One pass over E times the batch; layers below the first experts run once for all members. In the mode and with
        the gradients that the model is called with.

        Args:
            args: of the model's forward.
            kwargs: of the model's forward (`input_ids`, `attention_mask`, ...), without `groups` and `labels`.

        Returns:
            [N, E] raw scores in the model's dtype.

        Raises:
            TypeError: the model is no such mixture.
            ValueError: it has several labels, or `groups` or `labels` are given.
        """
        kwargs.pop("return_dict", None)
        for name in ("groups", "labels"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` must be None where all members score, which have no loss; leave it out.")
        if not by_sequence(self.config) or not self.umm_scores:
            raise TypeError(
                "`member_scores` needs a reward model in its mixture phase assigned by sequence, got a "
                f"{type(self).__name__} with assignment={self.config.upcycle_config.assignment!r}, "
                f"phase {self.config.umm_phase!r}."
            )
        logits = self(*args, **kwargs, groups=EVERY_MEMBER)  # a call: what shards a model hooks into calls
        if logits.shape[-1] != 1:
            raise ValueError(f"the model must give one reward a sequence, got {logits.shape[-1]} labels.")
        return logits.squeeze(-1).t()

    @property
    def umm_scores(self) -> bool:
        """Whether the model has a head that gives one row of logits for each sequence."""
        return gives_scores(type(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; a missing, unexpected or misshapen tensor is an error, never a random initialisation.

        A fresh head is made only where `num_labels` or `new_head=True` asks for one. An interrupted save into the
        folder is completed or forgotten first (see `ummrm.hf.replacing`).

        Raises:
            ValueError: the folder is not an upcycled model of this family, lacks some of its tensors, or has another
                fixed lambda in its weights than in its configuration; or `distributed_config` asks for what it can't
                be sharded by (see `ummrm.hf.parallel`).
            OSError: as in transformers, or an interrupted save can't be completed.
        """
        source, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        loading.settle(source, kwargs.get("subfolder", ""))
        new_head = kwargs.pop("new_head", False) or loading.asks_for_head(cls, source, kwargs)
        if settings := kwargs.get("distributed_config"):
            check_distributed(loading.config_of(cls, source, kwargs), settings)
        kwargs["ignore_mismatched_sizes"] = True  # so that the error names the tensor
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        loading.check_loaded(model, info, source, new_head=new_head)
        check_share(model, source)
        freeze_for_merge(model)  # loading makes new parameters
        return (model, info) if wants_info else model

    @classmethod
    def maybe_distribute_model(cls, *args, **kwargs):
        """As in transformers, whose hook it is between building a model and reading its weights."""
        with balanced_shards():
            return super().maybe_distribute_model(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        """As in torch; a fixed lambda that comes with the weights goes into the configuration too."""
        result = super().load_state_dict(*args, **kwargs)
        follow_share(self)
        return result

    # positional arguments beyond the folder are few and named differently from version to version: all by keyword
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # type: ignore[override]
        """As in transformers, but atomic, and touching no file that it does not write (see `ummrm.hf.saving`)."""
        follow_share(self)

        def save(folder: str | os.PathLike, **more: Any) -> None:
            super(UmmPreTrainedMixin, self).save_pretrained(folder, **more)
            if more.get("is_main_process", True):
                copy_code(self, folder)

        saving.save_atomically(save, save_directory, **kwargs)


def install(model: UmmPreTrainedMixin) -> None:
    """Exchanges the dense FFNs of a freshly built stock model for this configuration's; idempotent.

    Runs in every class's `__init__`: heads build their backbone through AutoModel (already exchanged then) or by a
    hard-coded stock class (GPT-NeoX, BERT), whose class is exchanged here too.
    """
    from .registry import umm_class  # which is built on this module

    config, backbone = model.config, model.base_model
    family = config.umm_row
    family.check(config)
    if not isinstance(backbone, UmmPreTrainedMixin):
        _exchange_class(backbone, umm_class(type(backbone)))
    model.family = backbone.family = family
    layers = family.layer_list(backbone)
    chosen = config.upcycle_config.layer_indices(len(layers))
    if not isinstance(layers[0], UmmLayerMixin):
        _exchange_layers(model, chosen)
    headless = model is backbone and not model.umm_scores
    if config.upcycle_config.has_head_experts and not headless and not model.umm_head:
        model.umm_head = head_name(model)
        _exchange_linear(model, model.umm_head, backbone)
    # device_map must keep a layer whole, and FSDP wraps each by the names here, of which none may be missing; a head
    # that made its backbone itself has collected the stock names alone
    ours = {type(layer).__name__ for layer in layers}
    for holder in (backbone, model):
        others = {*(holder._no_split_modules or ())} - {name.removeprefix("Umm") for name in ours}
        holder._no_split_modules = others | ours
        declare_plans(holder)


def _exchange_layers(model: UmmPreTrainedMixin, chosen: tuple[int, ...]) -> None:
    family, config, backbone = model.family, model.config, model.base_model
    upcycle_config, merge_config, layers = config.upcycle_config, config.merge_config, family.layer_list(backbone)
    if merge_config is not None:
        setattr(backbone, SHARE_NAME, MergeShare(merge_config, family.dense_ffn(layers[0], config).up.weight.device))
    layer: Any
    for index, layer in enumerate(layers):
        if index in chosen:
            dense = family.dense_ffn(layer, config)
            kind: dict[str, Any] = {"dtype": dense.up.weight.dtype, "device": dense.up.weight.device}
            ffn: UpcycledFFN | MergingFFN
            if merge_config is None:
                ffn = UpcycledFFN(dense.spec, upcycle_config, **kind)
            else:
                ffn = MergingFFN(dense.spec, upcycle_config, merge_config, getattr(backbone, SHARE_NAME), **kind)
            layer.set_submodule(family.site, ffn)
            if upcycle_config.has_linear_experts:
                _exchange_linears(layer, backbone, family)
            for path in family.bypass:
                layer.set_submodule(path, nn.Identity())
        stock: Any = type(layer)
        layer.__class__ = umm_layer_class(stock, family.passes_mask)
        layer.umm_site = family.site
        layer.umm_above = index >= min(chosen)
    masked: Any = backbone
    if family.masked:
        masked = backbone.get_submodule(family.masked)
        inner: Any = type(masked)
        _exchange_class(masked, umm_inner_class(inner))
    masked.umm_passes_mask = family.passes_mask
    masked.umm_lower_layers = min(chosen) if family.shares_lower_layers else 0


def _exchange_linears(layer: nn.Module, backbone: PreTrainedModel, family: Family) -> None:
    """Exchanges the linear layers of a layer that are no part of its FFN, which has been exchanged already."""
    ffn = {path.partition("[")[0] for path in family.paths.given.values()}
    for name in [n for n, m in layer.named_modules() if is_linear(m) and n not in ffn]:
        _exchange_linear(layer, name, backbone)


def _exchange_linear(holder: nn.Module, name: str, backbone: PreTrainedModel) -> None:
    config: Any = backbone.config
    new: Any = UpcycledLinear.like(holder.get_submodule(name), config.upcycle_config)
    if config.merge_config is not None:
        new = MergingLinear(new, config.merge_config, getattr(backbone, SHARE_NAME))
    holder.set_submodule(name, new)


def _exchange_class(model: PreTrainedModel, new: type[nn.Module]) -> None:
    model.__class__ = new  # type: ignore[assignment]
    # transformers looks up what a model can record (hidden states, attentions) by class, as its __init__ left it
    by_name = type(_CAN_RECORD_REGISTRY) is dict  # as in earlier versions of transformers 5
    key: Any = str(new) if by_name else model
    _CAN_RECORD_REGISTRY[key] = model._can_record_outputs


def freeze_for_merge(model: nn.Module) -> None:
    """In a model's merge phase lets only alpha (and lambda, if learned) require a gradient; else does nothing."""
    learned = [part.alpha for part in merging_parts(model).values()]
    if learned:
        learned += [p for m in model.modules() if isinstance(m, MergeShare) for p in m.parameters()]
        model.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)


def ffn_sites(model: UmmPreTrainedMixin) -> dict[int, str]:
    """Layer index to full name of each exchanged FFN of a model, ascending."""
    family, backbone = model.family, model.base_model
    prefix = "" if backbone is model else f"{model.base_model_prefix}."
    chosen = model.config.upcycle_config.layer_indices(len(family.layer_list(backbone)))
    return {index: f"{prefix}{family.layers}.{index}.{family.site}" for index in chosen}


def __getattr__(name: str) -> type:
    """The registered classes by name (`UmmLlamaForSequenceClassification`, ...), made when they are asked for."""
    if not name.startswith("Umm"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .registry import class_by_name

    try:
        return class_by_name(name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
