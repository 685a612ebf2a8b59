"""Upcycled models as real `PreTrainedModel` classes: one registered class per family and task.

`import ummrm` registers, for every row of `families.py`, a configuration (`model_type: "umm_llama"`, ...) and a class
for each task that the family has in transformers (`UmmLlamaForSequenceClassification`, ...), so that the Auto classes
load upcycled folders. A class is its stock class with the FFNs exchanged; the same class serves both phases
(`config.umm_phase`). How tensors get in and out is `upcycle.py`'s and `merge.py`'s business.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as hf_init
from transformers.modeling_utils import _CAN_RECORD_REGISTRY
from transformers.models.auto import modeling_auto

from ..config import MergeConfig, UpcycleConfig
from ..nn.experts import Experts
from ..nn.losses import auxiliary_loss, share_of_step
from ..nn.merging_ffn import MergeShare, MergingFFN
from ..nn.router import Router, in_backward
from ..nn.upcycled_ffn import UpcycledFFN, check_masked
from . import loading, saving
from .families import FAMILIES, Family
from .rope_keys_v4 import write_rope_keys_v4

PHASES = ("mixture", "merging")
SHARE_NAME = "umm_merge_share"


class UmmConfigMixin:
    """The part of a configuration that ummrm adds to the stock one.

    Attributes:
        umm: `UpcycleConfig.to_dict()`.
        umm_phase: `"mixture"` (experts and routers are trained) or `"merging"` (frozen experts, learnable merge).
        umm_merge: `MergeConfig.to_dict()` in the merge phase.
        umm_base_model: name or path of the dense model that was upcycled, where it had one.
    """

    umm = None
    umm_phase = "mixture"
    umm_merge = None
    umm_base_model = None

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
        return MergeConfig.from_dict(self.umm_merge) if self.umm_phase == "merging" else None


class UmmPreTrainedMixin:
    """What every upcycled model class adds to its stock class."""

    family: Family
    stock_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args, **kwargs) -> None:
        if not isinstance(config, UmmConfigMixin):
            raise ValueError(
                f"`config` must be a {umm_config_class(self.family).__name__} to build a {type(self).__name__}, got a "
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
        elif isinstance(module, MergingFFN):
            hf_init.zeros_(module.alpha)
        elif isinstance(module, MergeShare):
            module.reset_parameters(constant_=hf_init.constant_)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func: Callable | None = None, **kwargs):
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "`use_reentrant` must be False for an upcycled model: reentrant checkpointing runs the forward without "
                'autograd, which cuts the routers\' auxiliary losses off. Pass {"use_reentrant": False}.'
            )
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; a missing, unexpected or misshapen tensor is an error, never a random initialisation.

        A fresh head is made only where `num_labels` or `new_head=True` asks for one. An interrupted save into the
        folder is completed or forgotten first (see `ummrm.hf.replacing`).

        Raises:
            ValueError: the folder is not an upcycled model of this family, or lacks some of its tensors.
            OSError: as in transformers, or an interrupted save can't be completed.
        """
        source, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        new_head = kwargs.pop("new_head", False) or loading.asks_for_head(source, kwargs.get("config"), kwargs)
        loading.settle(source, kwargs.get("subfolder", ""))
        kwargs["ignore_mismatched_sizes"] = True  # so that the error names the tensor
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        loading.check_loaded(model, info, source, new_head=new_head)
        freeze_for_merge(model)  # loading makes new parameters
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in transformers, but atomic, and touching no file that it does not write (see `ummrm.hf.saving`)."""
        saving.save_atomically(super().save_pretrained, save_directory, **kwargs)


def install(model: UmmPreTrainedMixin) -> None:
    """Exchanges the dense FFNs of a freshly built stock model for this configuration's; idempotent.

    Runs in every class's `__init__`: heads build their backbone through AutoModel (already exchanged then) or by a
    hard-coded stock class (GPT-NeoX, BERT), whose class is exchanged here too.
    """
    family, config, backbone = model.family, model.config, model.base_model
    if not isinstance(backbone, UmmPreTrainedMixin):
        _exchange_class(backbone, umm_class(type(backbone)))
    family.check(config)
    layers = family.layer_list(backbone)
    chosen = config.upcycle_config.layer_indices(len(layers))
    if not isinstance(layers[0], _UmmLayerMixin):
        _exchange_layers(model, chosen)
    # device_map must keep a layer whole; a head that made its backbone itself has collected the stock names alone
    for holder in (backbone, model):
        holder._no_split_modules = {*(holder._no_split_modules or ()), *(type(layer).__name__ for layer in layers)}


def _exchange_layers(model: UmmPreTrainedMixin, chosen: tuple[int, ...]) -> None:
    family, config, backbone = model.family, model.config, model.base_model
    upcycle_config, merge_config, layers = config.upcycle_config, config.merge_config, family.layer_list(backbone)
    if merge_config is not None:
        setattr(backbone, SHARE_NAME, MergeShare(merge_config, family.dense_ffn(layers[0], config).up.weight.device))
    for index, layer in enumerate(layers):
        if index in chosen:
            dense = family.dense_ffn(layer, config)
            kind = {"dtype": dense.up.weight.dtype, "device": dense.up.weight.device}
            if merge_config is None:
                ffn = UpcycledFFN(dense.spec, upcycle_config, **kind)
            else:
                ffn = MergingFFN(dense.spec, upcycle_config, merge_config, getattr(backbone, SHARE_NAME), **kind)
            layer.set_submodule(family.site, ffn)
            for path in family.bypass:
                layer.set_submodule(path, nn.Identity())
        layer.__class__ = _umm_layer_class(type(layer), family)
    if family.masked:
        inner = backbone.get_submodule(family.masked)
        _exchange_class(inner, _umm_inner_class(type(inner), family))


def _exchange_class(model: PreTrainedModel, new: type[PreTrainedModel]) -> None:
    model.__class__ = new
    # transformers looks up what a model can record (hidden states, attentions) by class, as its __init__ left it
    by_name = type(_CAN_RECORD_REGISTRY) is dict  # as in earlier versions of transformers 5
    _CAN_RECORD_REGISTRY[str(new) if by_name else model] = model._can_record_outputs


def freeze_for_merge(model: nn.Module) -> None:
    """In a model's merge phase lets only alpha (and lambda, if learned) require a gradient; else does nothing."""
    learned = [m.alpha for m in model.modules() if isinstance(m, MergingFFN)]
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


# ---- classes ---------------------------------------------------------------------------------------------------


class _UmmLayerMixin:
    """A layer that takes the token mask as an argument, so that checkpointing recomputes with the same one."""

    umm_site: str

    def umm_forward(self, stock_forward: Callable, token_mask: torch.Tensor | None, args: tuple, kwargs: dict):
        ffn = self.get_submodule(self.umm_site)
        if not isinstance(ffn, (UpcycledFFN, MergingFFN)):  # a layer that was not chosen for upcycling
            return stock_forward(self, *args, **kwargs)
        ffn.token_mask = token_mask
        try:
            return stock_forward(self, *args, **kwargs)
        finally:
            ffn.token_mask = None


class _HandedMaskMixin(_UmmLayerMixin):
    """A layer whose backbone passes no argument on: `_handing_down` leaves the token mask here beside the call.

    The call makes it an argument, which transformers' own activation checkpointing keeps for the recomputation.
    """

    umm_handed: tuple[torch.Tensor | None] | None = None  # None outside a forward of the backbone

    def __call__(self, *args, **kwargs):
        if self.umm_handed is not None:
            kwargs["token_mask"] = self.umm_handed[0]
        elif in_backward():
            raise RuntimeError(
                f"{type(self).__name__} is recomputed by a checkpointing wrapper that calls the layer anew, without "
                "its token mask; checkpoint with model.gradient_checkpointing_enable() instead of wrapping layers."
            )
        return super().__call__(*args, **kwargs)


@functools.cache
def _layer_class(stock: type[nn.Module], site: str, mixin: type[_UmmLayerMixin]) -> type[nn.Module]:
    stock_forward = stock.forward

    def forward(self, *args, token_mask=None, **kwargs):
        return self.umm_forward(stock_forward, token_mask, args, kwargs)

    forward.__wrapped__ = stock_forward  # transformers reads layer signatures
    return _new_class(f"Umm{stock.__name__}", (mixin, stock), {"forward": forward, "umm_site": site})


def _umm_layer_class(stock: type[nn.Module], family: Family) -> type[nn.Module]:
    return _layer_class(stock, family.site, _UmmLayerMixin if family.passes_mask else _HandedMaskMixin)


@functools.cache
def _umm_inner_class(stock: type[nn.Module], family: Family) -> type[nn.Module]:
    return _new_class(f"Umm{stock.__name__}", (stock,), {"forward": _handing_down(stock, family)})


def _handing_down(stock: type[nn.Module], family: Family) -> Callable:
    """The stock forward of `family.masked`, handing the token mask of a 2-D attention mask down to every layer."""
    stock_forward = stock.forward
    names = list(inspect.signature(stock_forward).parameters)[1:]

    def argument(name: str, args: tuple, kwargs: dict):
        index = names.index(name)
        return args[index] if index < len(args) else kwargs.get(name)

    def token_mask(args: tuple, kwargs: dict) -> torch.Tensor | None:
        mask = argument("attention_mask", args, kwargs)
        tokens = argument("input_ids", args, kwargs)
        tokens = argument("inputs_embeds", args, kwargs) if tokens is None else tokens
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or tokens is None:
            return None
        # with a cache the mask covers past tokens too; the layer sees only the newest ones
        return mask[:, -tokens.shape[1] :].bool()

    @functools.wraps(stock_forward)
    def forward(self, *args, **kwargs):
        given = kwargs.pop("token_mask", None)
        mask = token_mask(args, kwargs) if given is None else given
        if family.passes_mask:
            if mask is None:
                return stock_forward(self, *args, **kwargs)
            outputs = stock_forward(self, *args, **kwargs, token_mask=mask)
            check_masked(self)
            return outputs
        layers = [module for module in self.modules() if isinstance(module, _HandedMaskMixin)]
        for layer in layers:
            layer.umm_handed = (mask,)
        try:
            return stock_forward(self, *args, **kwargs)
        finally:
            for layer in layers:
                layer.umm_handed = None

    return forward


def _task_forward(stock: type[PreTrainedModel]) -> Callable:
    """The stock task forward; in training, a loss that it computes itself includes the auxiliary losses."""
    stock_forward = stock.forward

    @functools.wraps(stock_forward)
    def forward(self, *args, **kwargs):
        as_tuple = kwargs.pop("return_dict", None) is False or self.config.return_dict is False
        outputs = stock_forward(self, *args, **kwargs, return_dict=True)
        if self.training and self.config.umm_phase == "mixture" and getattr(outputs, "loss", None) is not None:
            shifted = self.loss_type == "ForCausalLM"
            share = share_of_step(kwargs.get("labels"), kwargs.get("num_items_in_batch"), shifted)
            outputs.loss = outputs.loss + (share * auxiliary_loss(self)).to(outputs.loss)
        return outputs.to_tuple() if as_tuple else outputs

    return forward


def _new_class(name: str, bases: tuple[type, ...], namespace: dict) -> type:
    cls = type(name, bases, {"__module__": __name__, "__qualname__": name, "__doc__": None, **namespace})
    setattr(sys.modules[__name__], name, cls)  # so that it pickles
    return cls


_CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {}
_MODEL_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def umm_config_class(family: Family) -> type[PreTrainedConfig]:
    """The registered configuration class of a family, e.g. `UmmLlamaConfig`."""
    return _CONFIG_CLASSES[family.model_type]


def umm_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The registered upcycled class of a stock model class.

    Raises:
        ValueError: there is none.
    """
    if stock not in _MODEL_CLASSES:
        known = ", ".join(sorted({s.__name__ for s in _MODEL_CLASSES}))
        raise ValueError(
            f"no upcycled class for {stock.__name__}; there is one for each of: {known}. For another architecture add "
            "a row to ummrm/hf/families.py, or replace FFN modules yourself with UpcycledFFN.from_dense(ffn, config)."
        )
    return _MODEL_CLASSES[stock]


def stock_classes(family: Family) -> list[type[PreTrainedModel]]:
    """The stock model classes of a family that have an upcycled counterpart, the backbone first."""
    return [stock for stock, upcycled in _MODEL_CLASSES.items() if upcycled.family is family]


def upcycled_config(stock: PreTrainedConfig, config: UpcycleConfig) -> PreTrainedConfig:
    """The stock configuration with ummrm's section, as the family's registered class."""
    new = copy.deepcopy(stock)  # a dict round trip would lose the attention implementation
    new.__class__ = umm_config_class(FAMILIES[stock.model_type])
    new.umm = config.to_dict()
    new.umm_phase = "mixture"
    new.umm_base_model = stock._name_or_path or None
    return new


def stock_config(config: UmmConfigMixin) -> PreTrainedConfig:
    """The original configuration: no trace of ummrm, and the legacy rotary keys beside the new ones."""
    family = next(f for f in FAMILIES.values() if isinstance(config, umm_config_class(f)))
    new = copy.deepcopy(config)
    new.__class__ = family.config_class
    for key in ("umm", "umm_phase", "umm_merge", "umm_base_model"):
        new.__dict__.pop(key, None)
    write_rope_keys_v4(new, family)
    return new


def register_family(family: Family) -> None:
    """Makes a family known, as if it had a row in families.py: models of it upcycle, and upcycled folders load.

    Args:
        family: its row.

    Raises:
        ValueError: transformers does not know its `model_type` or has no AutoModel for it, or another row for it is
            registered.
    """
    known = FAMILIES.get(family.model_type)
    if known is None:
        _define(family)
        FAMILIES[family.model_type] = family
    elif known != family:
        raise ValueError(
            f"`family` must be the only row of {family.model_type!r}, which has another one: {known}. A row can't be "
            "exchanged once its classes exist; register yours before that one is used."
        )


def _define(family: Family) -> None:
    stock_config_class = family.config_class
    backbone_class = AutoModel._model_mapping.get(stock_config_class, None)
    if backbone_class is None:
        raise ValueError(f"`model_type` must be one that AutoModel has a model for, got {family.model_type!r}.")
    plan = getattr(stock_config_class, "base_model_tp_plan", None)
    namespace = {"model_type": f"umm_{family.model_type}"}
    if plan:  # the stock plan shards projections that are no longer there
        dense = {f"{family.layers}.*.{path}" for path in family.paths.modules}
        namespace["base_model_tp_plan"] = {k: v for k, v in plan.items() if k not in dense}
    name = f"Umm{stock_config_class.__name__}"
    config_class = _new_class(name, (UmmConfigMixin, stock_config_class), namespace)
    _CONFIG_CLASSES[family.model_type] = config_class
    AutoConfig.register(config_class.model_type, config_class)
    for auto_class in _auto_classes():
        stock = auto_class._model_mapping.get(stock_config_class, None)
        for stock_class in stock if isinstance(stock, (list, tuple)) else [stock]:
            # an Auto class may map a configuration to a composite model that only has such a model inside
            if stock_class is not None and issubclass(stock_config_class, stock_class.config_class):
                if stock_class not in _MODEL_CLASSES:
                    is_backbone = stock_class is backbone_class
                    if is_backbone and not family.masked:
                        forward = _handing_down(stock_class, family)
                    else:
                        forward = stock_class.forward if is_backbone else _task_forward(stock_class)
                    _MODEL_CLASSES[stock_class] = _define_model(stock_class, forward, family)
                auto_class.register(config_class, _MODEL_CLASSES[stock_class], exist_ok=True)


def _define_model(stock: type[PreTrainedModel], forward: Callable, family: Family) -> type[PreTrainedModel]:
    namespace = {
        "family": family,
        "stock_class": stock,
        "config_class": umm_config_class(family),
        "forward": forward,
        # alpha and the router are trained in fp32 whatever the model's dtype
        "_keep_in_fp32_modules_strict": [*(stock._keep_in_fp32_modules_strict or []), "router", "alpha", SHARE_NAME],
    }
    return _new_class(f"Umm{stock.__name__}", (UmmPreTrainedMixin, stock), namespace)


def _auto_classes() -> list[type]:
    classes = [c for n, c in vars(modeling_auto).items() if n.startswith("AutoModel") and inspect.isclass(c)]
    return [c for c in classes if getattr(c, "_model_mapping", None) is not None]


for _family in FAMILIES.values():
    _define(_family)
