"""The registered classes: one configuration class per family, one model class per family and task.

They are what the Auto classes load upcycled folders as, and are made when the first of a family is needed: importing
ummrm imports no model, and a family that the installed transformers lacks costs nobody else anything. What the classes
do is the business of `modeling.py` and `masks.py`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from ..config import UpcycleConfig
from ..nn.losses import auxiliary_loss, share_of_step
from .configuration import KEYS, PREFIX, UmmConfigMixin
from .families import FAMILIES, REGISTERED, Family, known_family
from .generated import new_class
from .masks import handing_down
from .merge_share import SHARE_NAME
from .modeling import UmmPreTrainedMixin
from .rope_keys_v4 import write_rope_keys_v4
from .sequence import (
    EVERY_MEMBER,
    assigned_groups,
    bind,
    by_sequence,
    call_groups,
    check_no_groups,
    handed_groups,
    mean_over_members,
    member_logits,
    members_of_config,
)

_DEFINING = threading.RLock()  # two threads that need a family at once get the same classes
_CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {}
_MODEL_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def umm_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of a family, e.g. `UmmLlamaConfig`; at the first call its model classes are made too.

    Args:
        model_type: transformers' name of the stock family, e.g. `"llama"`.

    Raises:
        ValueError: transformers does not know it, has no AutoModel for it, or can't import it.
    """
    with _DEFINING:
        if model_type not in _CONFIG_CLASSES:
            config_class, backbone, heads = _stock(model_type)
            own_name = config_class.model_type  # transformers has second names for some
            if own_name not in _CONFIG_CLASSES:
                _define(own_name, config_class, backbone, heads)
            _CONFIG_CLASSES[model_type] = _CONFIG_CLASSES[own_name]
        return _CONFIG_CLASSES[model_type]


def umm_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The upcycled class of a stock model class.

    Raises:
        ValueError: there is none.
    """
    model_type = getattr(getattr(stock, "config_class", None), "model_type", "")
    if stock not in _MODEL_CLASSES and model_type:
        umm_config_class(model_type)
    if stock not in _MODEL_CLASSES:
        config_class = _CONFIG_CLASSES.get(model_type)
        known = [s.__name__ for s, ours in _MODEL_CLASSES.items() if ours.config_class is config_class]
        raise ValueError(
            f"no upcycled class for {stock.__name__}; there is one for each of: {', '.join(sorted(known)) or 'none'}. "
            "For another model class register it with transformers' Auto classes, or replace FFN modules yourself with "
            "UpcycledFFN.from_dense(ffn, config)."
        )
    return _MODEL_CLASSES[stock]


def stock_classes(family: Family) -> list[type[PreTrainedModel]]:
    """The stock model classes of a family that have an upcycled counterpart, the backbone first."""
    config_class = umm_config_class(family.model_type)
    return [stock for stock, ours in _MODEL_CLASSES.items() if ours.config_class is config_class]


def registered_class(model_type: str, name: str) -> type[PreTrainedModel] | None:
    """The model class of this name that an Auto class has for a family, stock or registered; None: there is none."""
    if model_type in CONFIG_MAPPING:
        found = (auto._model_mapping.get(CONFIG_MAPPING[model_type], None) for auto in _auto_classes())
        for models in found:
            for cls in models if isinstance(models, (list, tuple)) else (models,):
                if getattr(cls, "__name__", None) == name:
                    return cls
    return None


def class_by_name(name: str) -> type:
    """The class `Umm<stock name>`, of a configuration or a model.

    Raises:
        AttributeError: transformers has no such stock class.
        ValueError: it has, and can't import it.
    """
    stock = name.removeprefix("Umm")
    if stock != name:
        for model_type in (None, *_model_types(stock)):
            if model_type is not None:
                umm_config_class(model_type)
            for cls in (*_CONFIG_CLASSES.values(), *_MODEL_CLASSES.values()):
                if cls.__name__ == name:
                    return cls
    raise AttributeError(name)


def _model_types(stock: str) -> Iterator[str]:
    """The model types that transformers has a class of this name for, those of a row first."""
    found: dict[str, None] = {}
    for mapping in (
        configuration_auto.CONFIG_MAPPING_NAMES,
        *(names for key, names in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES")),
    ):
        for model_type, names in mapping.items():
            if stock == names or (isinstance(names, (list, tuple)) and stock in names):
                found[model_type] = None
    yield from sorted(found, key=lambda model_type: known_family(model_type) is None)


def upcycled_config(stock: PreTrainedConfig, config: UpcycleConfig, row: Family | None = None) -> PreTrainedConfig:
    """The stock configuration with ummrm's section, as the family's registered class.

    Args:
        stock: the dense model's.
        config: how it is upcycled.
        row: the family's; None is the one that is known. One that no table has goes into the configuration, so that
            the checkpoint can be read where nothing is registered.
    """
    new = copy.deepcopy(stock)  # a dict round trip would lose the attention implementation
    new.__class__ = umm_config_class(stock.model_type)
    new.umm = config.to_dict()
    new.umm_phase = "mixture"
    new.umm_base_model = stock._name_or_path or None
    if code := vars(new).pop("auto_map", None):  # it names the stock classes, which must not be taken for ours
        new.umm_code = code
    row = known_family(stock.model_type) if row is None else row
    if row is not None and row != FAMILIES.get(stock.model_type):
        new.umm_family = row.to_dict()
    return new


def stock_config(config: UmmConfigMixin) -> PreTrainedConfig:
    """The original configuration: no trace of ummrm, and the legacy rotary keys beside the new ones."""
    row = config.umm_row
    new: Any = copy.deepcopy(config)
    new.__class__ = type(config).umm_stock
    # the latter two: the class's, which loading sets on the instance; how a sharded model's processes share it
    for key in (*KEYS, "model_type", "distributed_config"):
        new.__dict__.pop(key, None)
    if config.umm_code:
        new.auto_map = dict(config.umm_code)
    write_rope_keys_v4(new, row)
    return new


def register_family(family: Family) -> None:
    """Makes a family known, as if it had a row in families.py: models of it upcycle.

    Their checkpoints hold the row, so nothing needs to be registered where they are loaded.

    Args:
        family: its row.

    Raises:
        ValueError: transformers does not know its `model_type` or has no AutoModel for it, or another row for it is
            registered.
    """
    umm_config_class(family.model_type)
    known = known_family(family.model_type)
    if known is None:
        REGISTERED[family.model_type] = family
    elif known != family:
        raise ValueError(
            f"`family` must be the only row of {family.model_type!r}, which has another one: {known}. A row can't be "
            "exchanged; register yours before that one is used."
        )


# ---- making them -----------------------------------------------------------------------------------------------


def _stock(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[Any, list[Any]]]:
    """A family's stock classes: configuration, backbone, and the models of each Auto class that has some."""
    if model_type.startswith(PREFIX) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`model_type` must be known to transformers, got {model_type!r}; register its configuration and models "
            "with AutoConfig and the other Auto classes first."
        )
    try:
        config_class = CONFIG_MAPPING[model_type]
        backbone: Any = AutoModel._model_mapping.get(config_class, None)
        found = {auto: auto._model_mapping.get(config_class, None) for auto in _auto_classes()}
    except Exception as error:  # whatever the import of somebody else's module may raise
        raise ValueError(
            f"`model_type` {model_type!r} can't be used: transformers {transformers.__version__} fails to import its "
            f"models ({type(error).__name__}: {error}). Other families are not affected; to use this one, reinstall or "
            "upgrade transformers."
        ) from error
    if backbone is None:
        raise ValueError(f"`model_type` must be one that AutoModel has a model for, got {model_type!r}.")
    heads = {auto: list(m) if isinstance(m, (list, tuple)) else [m] for auto, m in found.items() if m is not None}
    # an Auto class may map a configuration to a composite model that only has such a model inside
    heads = {auto: [m for m in models if m.config_class is config_class] for auto, models in heads.items()}
    return config_class, backbone, heads


def _define(
    model_type: str, stock: type[PreTrainedConfig], backbone: type[PreTrainedModel], heads: dict[Any, list[Any]]
) -> None:
    namespace = {"model_type": f"{PREFIX}{model_type}", "umm_stock": stock, "_auto_class": None}
    config_class: Any = new_class(stock, (UmmConfigMixin,), (umm_config_class, model_type), namespace)
    classes = {}
    for stock_class in dict.fromkeys(cls for models in heads.values() for cls in models):
        forward = handing_down(stock_class) if stock_class is backbone else _task_forward(stock_class)
        classes[stock_class] = _model_class(stock_class, forward, config_class)
    _MODEL_CLASSES.update(classes)
    _CONFIG_CLASSES[model_type] = config_class
    CONFIG_MAPPING.register(config_class.model_type, config_class)
    for auto_class, models in heads.items():
        for stock_class in models:
            auto_class.register(config_class, classes[stock_class], exist_ok=True)
    _register_tokenizer(model_type, stock, config_class)


def _register_tokenizer(model_type: str, stock: type[PreTrainedConfig], config_class: type[PreTrainedConfig]) -> None:
    """AutoTokenizer goes by the model_type where a folder names no tokenizer class, or one known to be wrong.

    The one place that knows these private names; tests/hf/test_registry.py says when they go.
    """
    from transformers.models.auto import tokenization_auto as auto  # not before it is needed

    names = auto.TOKENIZER_MAPPING_NAMES
    corrected: set[str] = getattr(auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())  # not in every version
    ours = f"{PREFIX}{model_type}"
    if model_type in names:
        # found by class name, our entry must lead to the stock module
        configuration_auto.SPECIAL_MODEL_TYPE_TO_MODULE_NAME[ours] = configuration_auto.model_type_to_module_name(
            model_type
        )
        names[ours] = names[model_type]
    if model_type in corrected:
        corrected.add(ours)
    try:
        tokenizer = auto.TOKENIZER_MAPPING.get(stock, None)
    except Exception:  # a tokenizer that can't be imported costs the model nothing; AutoTokenizer says what is wrong
        return
    if tokenizer is not None:
        auto.TOKENIZER_MAPPING.register(config_class, tokenizer, exist_ok=True)


def _model_class(
    stock: type[PreTrainedModel], forward: Callable, config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    namespace = {
        "stock_class": stock,
        "config_class": config_class,
        "_auto_class": None,  # of a stock class that came with its model
        "forward": forward,
        # alpha and the router are trained in fp32 whatever the model's dtype
        "_keep_in_fp32_modules_strict": [*(stock._keep_in_fp32_modules_strict or []), "router", "alpha", SHARE_NAME],
    }
    return new_class(stock, (UmmPreTrainedMixin,), (umm_class, stock), namespace)


def _task_forward(stock: type[PreTrainedModel]) -> Callable:
    """The stock task forward; in training, a loss that it computes itself includes the auxiliary losses."""
    stock_forward = stock.forward

    @functools.wraps(stock_forward)
    def forward(self, *args, **kwargs):
        as_tuple = kwargs.pop("return_dict", None) is False or self.config.return_dict is False
        groups = kwargs.pop("groups", None)
        if groups is EVERY_MEMBER:
            return member_logits(self, stock_forward, bind(stock_forward, args, kwargs))[1]
        if by_sequence(self.config):
            outputs = _by_sequence(self, stock_forward, groups, args, kwargs)
            return outputs.to_tuple() if as_tuple else outputs
        check_no_groups(groups)
        outputs = stock_forward(self, *args, **kwargs, return_dict=True)
        if self.training and self.config.umm_phase == "mixture" and getattr(outputs, "loss", None) is not None:
            shifted = self.loss_type == "ForCausalLM"
            share = share_of_step(kwargs.get("labels"), kwargs.get("num_items_in_batch"), shifted)
            outputs.loss = outputs.loss + (share * auxiliary_loss(self)).to(outputs.loss)
        return outputs.to_tuple() if as_tuple else outputs

    return forward


def _by_sequence(model: Any, stock_forward: Callable, groups: object, args: tuple, kwargs: dict) -> Any:
    """A task forward whose sequences go through the experts that `groups` names, or through what evaluation says."""
    groups = assigned_groups(model) if groups is None else groups
    all_members = groups is None and not model.training and members_of_config(model.config)[1] == "mean"
    if all_members and model.umm_scores:
        return mean_over_members(model, stock_forward, bind(stock_forward, args, kwargs))
    with handed_groups(model, call_groups(model, stock_forward, groups, args, kwargs)):
        return stock_forward(model, *args, **kwargs, return_dict=True)


def _auto_classes() -> list[Any]:
    classes = [c for n, c in vars(modeling_auto).items() if n.startswith("AutoModel") and inspect.isclass(c)]
    return [c for c in classes if getattr(c, "_model_mapping", None) is not None]


class _OnDemand(dict):
    """What has been registered with AutoConfig, and every `umm_<stock model type>`, made when it is first asked for.

    transformers has no hook for that. Only what has been made is iterated over.
    """

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._stock_type(key) is not None

    def __missing__(self, key: str) -> type[PreTrainedConfig]:
        stock = self._stock_type(key)
        if stock is None:
            raise KeyError(key)
        return umm_config_class(stock)

    @staticmethod
    def _stock_type(key: object) -> str | None:
        if not isinstance(key, str) or not key.startswith(PREFIX):
            return None
        stock = key.removeprefix(PREFIX)
        # a name of ours has no counterpart itself
        return stock if not stock.startswith(PREFIX) and stock in CONFIG_MAPPING else None


# The one place that knows this private name; tests/hf/test_families.py says when it goes.
CONFIG_MAPPING._extra_content = _OnDemand(CONFIG_MAPPING._extra_content)
