"""The registered classes: one configuration class per family, one model class per family and task.

They are what the Auto classes load upcycled folders as. What the classes do is the business of `modeling.py` and
`masks.py`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable

from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..config import UpcycleConfig
from ..nn.losses import auxiliary_loss, share_of_step
from . import modeling
from .families import FAMILIES, Family
from .masks import HandedMaskMixin, UmmLayerMixin, handing_down
from .modeling import SHARE_NAME, UmmConfigMixin, UmmPreTrainedMixin
from .rope_keys_v4 import write_rope_keys_v4


def _new_class(name: str, bases: tuple[type, ...], namespace: dict) -> type:
    cls = type(name, bases, {"__module__": modeling.__name__, "__qualname__": name, "__doc__": None, **namespace})
    setattr(modeling, name, cls)  # so that it pickles
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


@functools.cache
def _layer_class(stock: type[nn.Module], site: str, mixin: type[UmmLayerMixin]) -> type[nn.Module]:
    stock_forward = stock.forward

    def forward(self, *args, token_mask=None, **kwargs):
        return self.umm_forward(stock_forward, token_mask, args, kwargs)

    forward.__wrapped__ = stock_forward  # transformers reads layer signatures
    return _new_class(f"Umm{stock.__name__}", (mixin, stock), {"forward": forward, "umm_site": site})


def umm_layer_class(stock: type[nn.Module], family: Family) -> type[nn.Module]:
    return _layer_class(stock, family.site, UmmLayerMixin if family.passes_mask else HandedMaskMixin)


@functools.cache
def umm_inner_class(stock: type[nn.Module], family: Family) -> type[nn.Module]:
    return _new_class(f"Umm{stock.__name__}", (stock,), {"forward": handing_down(stock, family)})


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
                        forward = handing_down(stock_class, family)
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
