"""Proof that a family's row fits a model: every layer, upcycled and merged back, computes what the dense one did.

One forward of a tiny random batch, before anything of the dense model is given away. A row is a claim about somebody
else's code; a wrong one would show only after all training. Whether a module by itself is an FFN is `nn/probe.py`'s
business.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import UpcycleConfig
from ..nn.assignment import sequence_modules
from ..nn.dense import FFNPaths, Projection
from ..nn.modes import evaluation_mode
from ..nn.probe import prove_paths
from ..nn.upcycled_linear import UpcycledLinear
from .families import Family
from .modeling import UmmPreTrainedMixin

_LENGTHS = (6, 4)  # live tokens of the batch's sequences; the shorter one is padded on the right
# Relative, of an FFN's output over all tokens. Two ways of rounding one FFN stay below a tenth of it, and what a wrong
# row leaves out is rarely below 0.1. bf16 and fp16 can't tell gelu from its tanh form, and don't need to.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 2e-3  # CUDA's fp32 products may be rounded to it


class _DoesNotFit(ValueError):
    """What the proof found, said in full."""


def check_row(family: Family, dense: PreTrainedModel, config: UpcycleConfig) -> tuple[int, ...]:
    """The layers that are upcycled. What a row names must be there, hold finite numbers, and be no more than an FFN.

    Costs a read of those layers' FFNs, and one FFN in fp32: the first layer's, run by itself in evaluation and training
    mode where it is a module of its own. What else stands in a layer is for `prove_layers`.

    Raises:
        ValueError: it does not; says what was found where.
    """
    what = _what(family, dense)
    layers = _named(dense.base_model, family.layers, what)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{what}: `layers` names {family.layers!r}, a {type(layers).__name__}, and must be the list of layers "
            "(docs/families.md)."
        )
    indices = config.layer_indices(len(layers))
    if family.masked and not isinstance(inner := _named(dense.base_model, family.masked, what), PreTrainedModel):
        raise ValueError(
            f"{what}: `masked` names {family.masked!r}, a {type(inner).__name__}, and must be a model of its own that "
            "is called with the attention mask (docs/families.md)."
        )
    for index in indices:
        layer = layers[index]
        for path in (family.site, *family.bypass):
            part = _named(layer, path, what, f"{family.layers}.{index}")
            if path not in family.bypass:
                continue
            dropouts = [n for n, m in part.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
            if dropouts:
                raise ValueError(
                    f"{what}: {family.layers}.{index}.{path} is bypassed and holds an active dropout, which would be "
                    "lost; an expert has none inside. Set its p to 0."
                )
        _check_finite(family, dense, index)
    _prove_module(family, dense, layers[indices[0]], what)
    return indices


def _named(module: nn.Module, path: str, what: str, name: str = "its backbone") -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{what}: {name} has no {path!r} ({error}); correct it (docs/families.md).") from None


def _check_finite(family: Family, dense: PreTrainedModel, index: int) -> None:
    layer = family.layer_list(dense.base_model)[index]
    family.paths.read(layer)  # says what is wrong with a path
    tensors: dict[str, Tensor] = {}
    for path in family.paths.modules:
        module = layer.get_submodule(path)
        tensors |= {f"{path}.{name}": tensor for name, tensor in module.named_parameters(recurse=False)}
    if not torch.isfinite(torch.stack([t.detach().sum(dtype=torch.float64) for t in tensors.values()])).all():
        for name, tensor in tensors.items():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ValueError(
                    f"`dense` must hold finite weights, got {bad} of {tensor.numel()} NaN or infinite in "
                    f"{family.layers}.{index}.{name}; load it again, or from a checkpoint before its training diverged."
                )


def _prove_module(family: Family, dense: PreTrainedModel, layer: nn.Module, what: str) -> None:
    prefix = f"{family.site}."
    if family.bypass or not all(path.startswith(prefix) for path in family.paths.modules):
        return
    activation = family.hf_activation(dense.config)
    below: dict[str, Any] = {
        name: path and path.removeprefix(prefix)
        for name, path in (("gate", family.paths.gate), ("up", family.paths.up), ("down", family.paths.down))
    }
    try:
        prove_paths(layer.get_submodule(family.site), FFNPaths(**below, activation=activation))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


@torch.no_grad()
def prove_layers(
    dense: PreTrainedModel, moe: UmmPreTrainedMixin, stock: PreTrainedModel, indices: Sequence[int]
) -> None:
    """Raises ValueError unless each upcycled layer, and each layer merged back, computes what the dense layer does.

    The upcycled backbone runs a batch of ten live tokens and two of padding, in evaluation mode without autocast; every
    dense layer and every merged one is called with what its upcycled counterpart was called with, so that no error of a
    layer hides or blames another. Costs one forward of each model on these tokens, and memory for one FFN.

    Args:
        dense: the dense model; it is left as it is, its modes and the random state too.
        moe: the upcycled one, its experts without noise.
        stock: a model of the stock class as `ummrm.merge` builds it; FFNs may be on the meta device and are left there.
        indices: the upcycled layers.
    """
    family, device = moe.family, next(dense.parameters()).device
    layers = {kind: family.layer_list(m.base_model) for kind, m in (("dense", dense), ("moe", moe), ("stock", stock))}
    batch, live = _batch(dense, device)
    proven: list[int] = []

    def compare(index: int, args: tuple, kwargs: dict, output: object, ffn_output: Tensor) -> None:
        plain = {name: value for name, value in kwargs.items() if name not in ("token_mask", "groups")}
        place = f"{family.layers}.{index}"
        expected, ffn_expected = _call(layers["dense"][index], family.site, args, plain)
        _compare(family, dense, f"{place}.{family.site}, upcycled,", ffn_output, ffn_expected, live)
        _compare(family, dense, f"{place}, upcycled,", _first(output), expected, live)
        merged = family.dense_ffn(layers["stock"][index], stock.config)
        merged.write(family.dense_ffn(layers["dense"][index], dense.config).fused())
        linears = _linear_experts(layers["moe"][index])
        for path in linears:
            origin = Projection(layers["dense"][index].get_submodule(path))
            Projection(layers["stock"][index].get_submodule(path)).write(origin.weight, origin.bias)
        try:
            got, _ = _call(layers["stock"][index], family.site, args, plain)
        finally:
            for path in (*family.paths.modules, *linears):
                layers["stock"][index].get_submodule(path).to("meta")
        _compare(family, dense, f"{place}, merged back into a stock layer,", got, expected, live)
        proven.append(index)

    handles = [_watch(layers["moe"][index], family.site, index, compare) for index in indices]
    try:
        with _at_rest(device, dense, moe, stock):
            moe.base_model(**batch, **_groups(moe, len(live), device))
        missing = [index for index in indices if index not in proven]
        if missing:
            raise _DoesNotFit(f"{_what(family, dense)}: a forward never calls {family.layers}.{missing[0]}.")
        _check_masks(family, dense, moe, indices, int(live.sum()))
    except _DoesNotFit as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # somebody else's code, on a claim that may be wrong
        place = f"after {family.layers}.{proven[-1]}" if proven else f"at or before {family.layers}.{indices[0]}"
        raise ValueError(
            f"{_what(family, dense)}: a forward of the upcycled model on a tiny batch fails {place} "
            f"({type(error).__name__}: {error}); correct the row (docs/families.md)."
        ) from error
    finally:
        for pair in handles:
            for handle in pair:
                handle.remove()
        for index in indices:
            ffn: Any = layers["moe"][index].get_submodule(family.site)
            ffn.statistics = None
            for part in sequence_modules(layers["moe"][index]).values():
                part.used_groups = None


def _linear_experts(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, UpcycledLinear)]


def _groups(moe: UmmPreTrainedMixin, rows: int, device: torch.device) -> dict[str, Tensor]:
    """By sequence: the first and the last expert, in order, so that the backbone leaves the rows where they are."""
    config = moe.config.upcycle_config
    if not config.by_sequence:
        return {}
    return {"groups": torch.linspace(0, config.num_experts - 1, rows).round().long().to(device)}


def _watch(layer: nn.Module, site: str, index: int, compare) -> tuple:
    outputs: list[Tensor] = []
    at_site = layer.get_submodule(site).register_forward_hook(lambda module, args, output: outputs.append(output))

    def done(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        compare(index, args, kwargs, output, outputs.pop())

    return at_site, layer.register_forward_hook(done, with_kwargs=True)


def _call(layer: nn.Module, site: str, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Output of a layer and of what stands at its FFN's site."""
    outputs: list[Tensor] = []
    handle = layer.get_submodule(site).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        return _first(layer(*args, **kwargs)), outputs.pop()
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _what(family: Family, dense: PreTrainedModel) -> str:
    return f"the row of {family.model_type!r} does not fit this {type(dense).__name__}"


def _compare(family: Family, dense: PreTrainedModel, place: str, got: Tensor, expected: Tensor, live: Tensor) -> None:
    dtype, on_cuda = expected.dtype, expected.is_cuda
    tolerance = _TF32_TOLERANCE if dtype == torch.float32 and on_cuda else _TOLERANCE[dtype]
    if got.shape != expected.shape:
        raise _DoesNotFit(
            f"{_what(family, dense)}: {place} gives {list(got.shape)} where the dense model gives "
            f"{list(expected.shape)}; correct the row (docs/families.md)."
        )
    got, expected = (t.detach().reshape(-1, t.shape[-1]).double() for t in (got, expected))
    if len(expected) == live.numel():  # else the backbone has left padding out
        got, expected = got[live.flatten()], expected[live.flatten()]
    finite = expected.isfinite().all(-1)
    if not finite.any():
        broken = [n for n, p in dense.named_parameters() if not p.isfinite().all()]
        raise _DoesNotFit(
            f"`dense` must compute finite numbers, and has none at {place.partition(',')[0]}"
            + (f": {broken[0]} holds NaN or infinite values; load it again." if broken else f" in {dtype}; widen it.")
        )
    got, expected = got[finite], expected[finite]
    error = ((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    if not error <= tolerance:
        bypassed = (
            f"more in {', '.join(family.bypass)} than the activation (a norm, a scale), " if family.bypass else ""
        )
        raise _DoesNotFit(
            f"{_what(family, dense)}: {place} is off by {error:.1e} (relative; {tolerance:.0e} is the rounding of "
            f"{str(dtype).removeprefix('torch.')}) from the dense model: {bypassed}another activation, or another "
            "projection. Correct the row (docs/families.md), or replace the FFN modules yourself with "
            "UpcycledFFN.from_dense(ffn, config)."
        )


def _check_masks(
    family: Family, dense: PreTrainedModel, moe: UmmPreTrainedMixin, indices: Sequence[int], live: int
) -> None:
    for index in indices:
        layer = family.layer_list(moe.base_model)[index]
        unused = [name for name, part in sequence_modules(layer).items() if part.used_groups is None]
        if unused:
            raise _DoesNotFit(f"{_what(family, dense)}: a forward never calls {family.layers}.{index}.{unused[0]}.")
        ffn: Any = layer.get_submodule(family.site)
        if ffn.router is None:
            continue
        routed = int(ffn.statistics.tokens_per_expert.sum())
        if routed != live * ffn.config.num_experts_per_tok:
            raise _DoesNotFit(
                f"{_what(family, dense)}: {family.layers}.{index} routes {routed // ffn.config.num_experts_per_tok} "
                f"tokens of a batch with {live} live ones, so the token mask does not reach it; set `masked` or "
                "`passes_mask` (docs/families.md)."
            )


def _batch(dense: PreTrainedModel, device: torch.device) -> tuple[dict[str, object], Tensor]:
    """Random tokens, padded on the right, and which are live."""
    config = dense.config
    vocabulary = getattr(dense.get_input_embeddings(), "num_embeddings", None) or config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(vocabulary, (len(_LENGTHS), max(_LENGTHS)), generator=generator, device="cpu")
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        ids = torch.where(ids == pad, (ids + 1) % vocabulary, ids)  # some count positions by it
    else:
        pad = 0
    live = torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]
    ids = ids.masked_fill(~live, pad)
    batch: dict[str, object] = {"input_ids": ids.to(device), "attention_mask": live.long().to(device)}
    if "use_cache" in inspect.signature(type(dense.base_model).forward).parameters:
        batch["use_cache"] = False
    return batch, live.to(device)


@contextlib.contextmanager
def _at_rest(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no autocast and a random state of its own; everything is put back."""
    cuda = [device] if device.type == "cuda" else []
    with evaluation_mode(*models), torch.random.fork_rng(cuda), torch.autocast(device.type, enabled=False):
        yield
