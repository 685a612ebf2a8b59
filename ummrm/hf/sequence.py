"""Assignment by sequence in a Hugging Face model: from the `groups` of a call to the rows of every layer.

A backbone orders its batch by group once, at its entrance, and puts its outputs back at its exit, so that no layer
permutes. What a layer does with its rows is `nn`'s business; how an argument gets to the layers, `masks.py`'s.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.assignment import MemberRows, RowGroups, going_by, sequence_modules
from .one_thread import one_thread

# Arguments of transformers' models that have a row for each sequence of the batch. Others are passed on as they are.
_ROW_ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "encoder_hidden_states",
    "encoder_attention_mask",
)
# Of their layers, beside the hidden states.
_LAYER_ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings", "token_type_ids")
_BIAS_OF_HEADS = "alibi"  # [rows, heads, ...], or [rows x heads, ...]
_BIAS_OF_ROWS = "position_bias"  # [rows, heads, queries, keys]; with fewer dimensions it is the same for all rows
# As `groups` of a reward model's call: its logits are those of every member, [E, N, labels].
EVERY_MEMBER = "every member"
_RECORDED = ("output_hidden_states", "output_attentions")


def by_sequence(config: Any) -> bool:
    """Whether a model of this configuration is a mixture assigned by sequence."""
    return config.umm_phase == "mixture" and isinstance(config.umm, dict) and config.umm.get("assignment") == "sequence"


def members_of_config(config: Any) -> tuple[int, Any]:
    """`num_experts` and `evaluation` of a mixture assigned by sequence, for forwards.

    Not by `config.upcycle_config` where both are said, as in every configuration that was saved: it builds a dataclass,
    of whose fields torch.compile makes no graph.
    """
    number, evaluation = config.umm.get("num_experts"), config.umm.get("evaluation")
    if number is None or evaluation is None:
        number, evaluation = config.upcycle_config.num_experts, config.upcycle_config.evaluation
    return number, evaluation


def bind(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name; `function` is a method."""
    names = list(inspect.signature(function).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _tokens(bound: Mapping[str, Any]) -> Any:
    """What a call has a row of for each sequence, or None."""
    tokens = bound.get("input_ids")
    return bound.get("inputs_embeds") if tokens is None else tokens


def assigned_groups(model: Any) -> RowGroups | None:
    """What `ummrm.assign_groups` or `ummrm.members` has said of a model."""
    return next((module.groups for module in sequence_modules(model).values()), None)


def check_no_groups(groups: object) -> None:
    """Raises ValueError if a model that is no mixture assigned by sequence was called with groups."""
    if groups is not None:
        raise ValueError(
            "`groups` must be None for a model that is no mixture assigned by sequence, got "
            f'{type(groups).__name__}; upcycle with UpcycleConfig(assignment="sequence"), or leave it out.'
        )


# ---- groups on their way to the backbone ----------------------------------------------------------------------------


@contextlib.contextmanager
def handed_groups(model: Any, groups: object) -> Iterator[None]:
    """Leaves a call's groups with the module that orders the batch, for heads that pass no argument on.

    With experts in the head too, which has the rows in the caller's order: it takes them from `call_groups`.
    """
    masked = masked_module(model)
    heads = sequence_modules(model.get_submodule(model.umm_head)).values() if model.umm_head else ()
    rows = groups if isinstance(groups, RowGroups) else None
    with contextlib.nullcontext() if torch.compiler.is_compiling() else one_thread(masked), going_by(heads, rows):
        masked.umm_groups = groups
        try:
            yield
        finally:
            masked.umm_groups = None


def call_groups(model: Any, stock_forward: Callable, groups: object, args: tuple, kwargs: dict) -> object:
    """What `handed_groups` takes for a call of a model: its groups, as rows where the head holds experts.

    Args:
        model: a mixture assigned by sequence.
        stock_forward: its stock class's.
        groups: of the call.
        args: of the call.
        kwargs: of the call.
    """
    if not model.umm_head:
        return groups
    tokens = _tokens(bind(stock_forward, args, kwargs))
    if tokens is None:
        return groups  # the backbone's forward says what is missing
    return row_groups(masked_module(model), groups, tokens.shape[0], tokens.device)


def masked_module(model: Any) -> Any:
    """The module of a model that is called with the attention mask."""
    backbone = model.base_model
    return backbone.get_submodule(model.family.masked) if model.family.masked else backbone


def row_groups(module: Any, groups: object, rows: int, device: torch.device) -> RowGroups:
    """The rows of each expert in a call of a backbone.

    Raises:
        ValueError: `groups` is missing in training, does not fit the batch, or a forward without it is to compute the
            members' mean, which a backbone has none of.
    """
    num_experts, evaluation = members_of_config(module.config)
    if groups is None:
        if module.training:
            raise ValueError(
                "`groups` must say in training which expert each sequence goes through, got None; pass groups=[rows], "
                "both answers of a pair in one group (UmmRewardTrainer does; ummrm.draw_groups draws them)."
            )
        if evaluation == "mean":
            raise ValueError(
                f'evaluation="mean" averages the scores of a reward model, and a {type(module).__name__} gives none by '
                "itself; name a member, ummrm.set_evaluation(model, 0), or pass groups=[rows]."
            )
        return MemberRows(evaluation, num_experts)
    length = groups.shape[0] if isinstance(groups, Tensor) and groups.dim() == 1 else rows
    length = groups.rows if isinstance(groups, RowGroups) and groups.rows >= 0 else length
    if length != rows:
        raise ValueError(
            f"`groups` must have one expert for each of the {rows} sequences, got {length}; both answers of a pair "
            "have its group, and what ummrm.assign_groups has said holds until it is called again."
        )
    if isinstance(groups, RowGroups):
        return groups.of_tokens()
    return RowGroups(groups, num_experts, device)  # type: ignore[arg-type]  # which it checks


# ---- a backbone's entrance and exit ---------------------------------------------------------------------------------


def run_by_sequence(module: Any, stock_forward: Callable, args: tuple, kwargs: dict, call: Callable) -> Any:
    """The stock forward of a backbone with its rows ordered by group.

    Args:
        module: the backbone.
        stock_forward: its stock class's.
        args: of the call.
        kwargs: of the call.
        call: runs the stock forward with `(arguments by name, rows)` and takes the rows to the layers.
    """
    bound = bind(stock_forward, args, kwargs)
    bound.pop("token_mask", None)
    given = bound.pop("groups", None)
    groups = module.umm_groups if given is None else given
    groups = assigned_groups(module) if groups is None else groups
    tokens = _tokens(bound)
    if tokens is None:
        return stock_forward(module, **bound)  # which says what is missing
    rows = row_groups(module, groups, tokens.shape[0], tokens.device)
    if rows.copies > 1:
        if module.umm_lower_layers:
            bound = _changed(bound, rows.rows, lambda t: t[: rows.rows // rows.copies])
        else:
            rows = rows.as_rows()
    elif rows.order is not None:
        order = rows.order
        _keep_no_cache(module, stock_forward, bound)
        bound = _changed(bound, rows.rows, lambda t: t.index_select(0, order))
    held = sequence_modules(module).values()
    for part in held:
        part.used_groups = None
    seen = rows.ordered()
    outputs = call(bound, seen)
    if not torch.compiler.is_compiling() and any(part.used_groups not in (None, seen) for part in held):
        raise RuntimeError(
            f"`groups` must reach every layer, and {type(module).__name__} of this version of transformers passes it "
            "on to none; upgrade transformers, or set passes_mask=False in the family's row (ummrm/hf/families.py)."
        )
    if rows.inverse is None:
        return outputs
    inverse = rows.inverse
    return _rows_of(outputs, rows.rows, lambda t: t.index_select(0, inverse))


def _changed(bound: dict[str, Any], rows: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Arguments with those that have a row for each sequence changed."""
    return {name: _rows_of(v, rows, change) if name in _ROW_ARGUMENTS else v for name, v in bound.items()}


def _rows_of(value: Any, rows: int, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.dim() > 1 and value.shape[0] == rows else value
    if isinstance(value, (tuple, list)):
        return type(value)(_rows_of(v, rows, change) for v in value)
    if isinstance(value, Mapping):
        changed = {key: _rows_of(v, rows, change) for key, v in value.items()}
        return type(value)(**changed) if hasattr(value, "to_tuple") else changed
    return value


def _keep_no_cache(module: Any, stock_forward: Callable, bound: dict[str, Any]) -> None:
    """Keys and values would be kept in another order than the caller's."""
    cache = bound.get("cache")
    cache = bound.get("past_key_values") if cache is None else cache  # until transformers 5.23
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            "`groups` must be in ascending order for a call with past_key_values, whose rows can't be put in order; "
            "order the batch, or go through one member: ummrm.set_evaluation(model, number)."
        )
    if "use_cache" in inspect.signature(stock_forward).parameters:
        bound["use_cache"] = False


# ---- members --------------------------------------------------------------------------------------------------------


def member_logits(model: Any, stock_forward: Callable, bound: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Every member's logits of one batch, in one pass: layers below the first experts run once for all members.

    Args:
        model: a mixture assigned by sequence with a head that gives one row of logits for each sequence.
        stock_forward: its stock class's.
        bound: the call's arguments by name.

    Returns:
        The stock outputs over all members' rows, and logits [E, N, labels].

    Raises:
        ValueError: hidden states or attentions are asked for, which members do not have in common.
    """
    bound = dict(bound)
    asked = [n for n in _RECORDED if bound.get(n) or (n not in bound and getattr(model.config, n, False))]
    if asked:
        raise ValueError(
            f"`{asked[0]}` must be False where all members run, since each has its own; name one with "
            "ummrm.set_evaluation(model, number), or pass groups=[rows]."
        )
    tokens = _tokens(bound)
    if not isinstance(tokens, Tensor):
        raise ValueError("`input_ids` or `inputs_embeds` must be given to score, got neither.")
    count, num_experts = tokens.shape[0], members_of_config(model.config)[0]
    if "use_cache" in inspect.signature(stock_forward).parameters:
        bound["use_cache"] = False
    if count == 1 and getattr(model.config.get_text_config(), "pad_token_id", None) is None:
        return _one_by_one(model, stock_forward, bound)
    bound = _changed(bound, count, lambda t: t.repeat(num_experts, *[1] * (t.dim() - 1)))
    with handed_groups(model, RowGroups.of_all(count, num_experts, tokens.device)):
        outputs = stock_forward(model, **bound, return_dict=True)
    return outputs, outputs.logits.unflatten(0, (num_experts, count))


def _one_by_one(model: Any, stock_forward: Callable, bound: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """`member_logits` by a forward for each, since stock heads that know no padding token take one sequence alone."""
    logits, num_experts = [], members_of_config(model.config)[0]
    for member in range(num_experts):
        with handed_groups(model, MemberRows(member, num_experts)):
            outputs = stock_forward(model, **bound, return_dict=True)
        logits.append(outputs.logits)
    return outputs, torch.stack(logits)


def mean_over_members(model: Any, stock_forward: Callable, bound: Mapping[str, Any]) -> Any:
    """The outputs of a head with the members' logits averaged, and the loss of that average."""
    bound = dict(bound)
    labels = bound.pop("labels", None)
    outputs, logits = member_logits(model, stock_forward, bound)
    outputs.logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).mean(0).to(logits.dtype)
    if labels is not None:
        outputs.loss = model.loss_function(labels=labels, pooled_logits=outputs.logits, config=model.config)
    return outputs


def spread(rows: RowGroups, stock_forward: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's arguments by name for all members, where the layers below have computed one block of equal rows.

    Its first argument is the hidden states. One that is not known to have a row for each sequence is passed on as it
    is.
    """
    bound = bind(stock_forward, args, kwargs)
    states = list(inspect.signature(stock_forward).parameters)[1]
    block, copies = rows.rows // rows.copies, rows.copies

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.repeat(copies, *[1] * (tensor.dim() - 1))

    def of_all(name: str, value: Any) -> Any:
        if name == _BIAS_OF_HEADS and isinstance(value, Tensor):
            return repeat(value) if value.shape[0] % block == 0 else value
        if name in _LAYER_ARGUMENTS or (name == _BIAS_OF_ROWS and isinstance(value, Tensor) and value.dim() == 4):
            return _rows_of(value, block, repeat)
        return value

    if bound[states].shape[0] == block:
        bound = {**bound, states: repeat(bound[states])}
    return {name: value if name == states else of_all(name, value) for name, value in bound.items()}


def first_experts(layers: nn.ModuleList) -> int:
    """Index of the first layer that holds experts."""
    held = (index for index, layer in enumerate(layers) if sequence_modules(layer))
    return next(held, len(layers))
