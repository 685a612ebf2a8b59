"""The mixture phase of an FFN: routed experts, always-on shared experts and, by token, a router in its place.

A plain `nn.Module` that works in any training loop, with no Hugging Face class around it. It keeps the
`ForwardStatistics` of its last forward for the auxiliary losses; how a whole model is upcycled is
`ummrm/upcycle.py`'s business.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .. import ops
from ..config import UpcycleConfig
from .assignment import BySequence, RowGroups
from .dense import DenseFFN, FFNPaths, FFNSpec
from .experts import Experts, are_parted, expert_arguments, flatten_tokens, no_experts
from .parallel import plain_name
from .probe import find_paths, prove_paths
from .router import ForwardStatistics, Router, in_backward


class UpcycledFFN(BySequence):
    """A dense FFN upcycled into E routed experts, K active per token, and S always-on shared experts.

    A drop-in replacement: [..., H] in, [..., H] out. `UpcycledFFN.from_dense` makes one from an existing FFN; at that
    moment it computes exactly what the FFN did. By token, `statistics` holds after each forward what the auxiliary
    losses need (`ummrm.auxiliary_loss`). By sequence there is no router: `ummrm.assign_groups(network, groups)` says
    which expert each row of x goes through.

    Args:
        spec: shape and kind of the FFN.
        config: number of experts, router, gate.
        dtype: of the experts; the router is always fp32.
        device: where parameters are created.
    """

    router: Router | None
    shared_experts: Experts | None

    def __init__(
        self,
        spec: FFNSpec,
        config: UpcycleConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.router = None if config.by_sequence else Router(spec.hidden_size, config, device)
        self.experts = Experts(config.num_experts, spec, dtype, device)
        self.shared_experts = Experts.shared(spec, config, dtype, device)
        self.statistics: ForwardStatistics | None = None
        self.token_mask: torch.Tensor | None = None  # set for one call by a model's layer; the argument wins
        self._dense_template: tuple[nn.Module, FFNPaths] | None = None
        self._start_by_sequence()

    @classmethod
    def from_dense(cls, ffn: nn.Module, config: UpcycleConfig, paths: FFNPaths | None = None) -> UpcycledFFN:
        """Upcycles one FFN module; `ffn` itself is left as it is.

        Args:
            ffn: a module mapping [..., H] to [..., H] by two (plain) or three (gated) `nn.Linear` projections.
            config: number of experts, router, gate, expert noise.
            paths: where its projections are; by default recognised from its structure. Either way proven on random
                input against the module's own output.

        Returns:
            A module on the same device and dtype, in the same training mode.

        Raises:
            ValueError: `ffn` has no structure that can be upcycled; says what was found and the remedy.
            TypeError: `ffn` or `config` is of another type.
        """
        _check_type("ffn", ffn, nn.Module)
        _check_type("config", config, UpcycleConfig)
        if isinstance(getattr(ffn, "experts", None), Experts):
            raise ValueError(f"`ffn` must be a dense FFN, got a {type(ffn).__name__}; it is upcycled already.")
        paths = find_paths(ffn) if paths is None else prove_paths(ffn, paths)
        dense = paths.read(ffn)
        weight = dense.up.weight
        upcycled = cls(dense.spec, config, dtype=weight.dtype, device=weight.device)
        upcycled.copy_experts(dense, config.expert_noise)
        upcycled._dense_template = (copy.deepcopy(ffn).to("meta"), paths)
        return upcycled.train(ffn.training)

    def copy_experts(self, dense: DenseFFN, noise: float) -> None:
        """Fills all experts with copies of `dense`; only routed experts get noise, in standard deviations."""
        if self.shared_experts is not None:
            self.shared_experts.copy_from(dense)
        self.experts.copy_from(dense, noise)

    def forward(
        self, x: torch.Tensor, token_mask: torch.Tensor | None = None, groups: RowGroups | None = None
    ) -> torch.Tensor:
        """Runs the layer.

        Args:
            x: [..., H]; by sequence [rows, ..., H], or flat with equally many tokens of each row.
            token_mask: bool of x's leading shape, True for live tokens, False for padding; for a flat x, [T, H], any
                shape of T flags. A masked token is computed by the shared experts alone and counts in no statistic. By
                sequence it has no effect: padding follows its row's expert.
            groups: by sequence: the experts of x's rows; what `assign_groups` has said goes behind it.

        Returns:
            [..., H] in x's dtype (the autocast dtype under autocast).

        Raises:
            ValueError: by sequence, in training, nothing says which expert a row goes through.
        """
        flat = flatten_tokens(x, self.spec.hidden_size)
        if self.router is None:
            return self._by_sequence(flat, self._row_groups(groups, x)).view(x.shape)
        mask = _flatten_mask(self.token_mask if token_mask is None else token_mask, x)
        routing = self.router(flat, mask)
        if not in_backward():
            self.statistics = ForwardStatistics(
                routing.tokens_per_expert,
                routing.mean_prob,
                routing.mean_z,
                self.config.num_experts_per_tok,
                routing.shared_weight.detach(),
                mask is not None,
            )
        run = self._parted if are_parted(self.experts) else self._fused
        return run(flat, routing, mask).view(x.shape)

    def _fused(self, flat: torch.Tensor, routing: ops.RouteOutput, mask: torch.Tensor | None) -> torch.Tensor:
        """Shared and routed experts in one launch."""
        experts: dict[str, Any] = expert_arguments(self.shared_experts, self.experts, flat)
        return ops.moe_ffn(
            flat,
            routing.shared_weight,
            routing.routed_weights,
            routing.expert_indices,
            **experts,
            activation=self.spec.activation,
            glu=self.spec.glu,
        )

    def _parted(self, flat: torch.Tensor, routing: ops.RouteOutput, mask: torch.Tensor | None) -> torch.Tensor:
        """Routed experts wherever they lie, and beside them the shared ones, which every process has."""
        live = None if mask is None else mask.nonzero().squeeze(1)  # padding is sent nowhere
        slots = (routing.expert_indices.long(), routing.routed_weights)  # int64, which counting by scatter takes
        out = self._exchanged(flat, *slots, live)
        if self.shared_experts is None:
            return out
        shared = self.shared_experts(flat)
        experts: dict[str, Any] = {f"shared_{name}": tensor for name, tensor in shared.items()}
        experts |= {f"routed_{name}": tensor for name, tensor in no_experts(shared).items()}
        none = torch.zeros_like(routing.routed_weights[:, :1])
        beside = ops.moe_ffn(
            flat,
            routing.shared_weight,
            none,
            torch.full_like(routing.expert_indices[:, :1], -1),
            **experts,
            activation=self.spec.activation,
            glu=self.spec.glu,
        )
        return out + beside.to(out.dtype)

    def _exchanged(
        self, flat: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, live: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Routed experts that lie on several processes; rows that are not `live` are 0."""
        if torch.is_autocast_enabled(flat.device.type):  # which the operators do too; half the bytes are sent
            flat = flat.to(torch.get_autocast_dtype(flat.device.type))
        if live is None:
            return self.experts(flat, indices, weights)
        out = self.experts(flat.index_select(0, live), indices.index_select(0, live), weights.index_select(0, live))
        return torch.zeros_like(flat).index_copy(0, live, out)

    def _by_sequence(self, flat: torch.Tensor, rows: RowGroups) -> torch.Tensor:
        spec = self.spec
        if are_parted(self.experts):
            indices = rows.experts_of(flat).unsqueeze(1)
            out = self._exchanged(flat, indices, torch.ones_like(indices, dtype=torch.float32))
        else:
            routed = self.experts(flat)

            def run(tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
                return ops.grouped_ffn(tokens, offsets, **routed, activation=spec.activation, glu=spec.glu)

            out = rows(run, flat)
        if self.shared_experts is None:
            return out
        shared = self.shared_experts(flat)
        weight, tokens, count = self.config.fixed_shared_weight, flat.shape[0], self.config.num_shared_experts
        # every token in every shared expert's group
        every = torch.arange(count + 1, dtype=torch.int32, device=flat.device) * tokens
        beside = ops.grouped_ffn(flat.repeat(count, 1), every, **shared, activation=spec.activation, glu=spec.glu)
        return torch.lerp(out, beside.unflatten(0, (count, tokens)).mean(0), weight)

    def __getstate__(self) -> dict:
        # Statistics carry a graph, which can be neither copied nor pickled, and belong to this module's last forward.
        return {**self.__dict__, "statistics": None, "token_mask": None, "groups": None, "used_groups": None}


def upcycled_ffns(model: nn.Module) -> dict[str, UpcycledFFN]:
    """The `UpcycledFFN` modules of a network by name, in order."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, UpcycledFFN)}


def check_masked(model: nn.Module) -> None:
    """Raises RuntimeError if an FFN's last forward had no token mask, where a model has handed one to its layers.

    Some backbones of transformers 5.0 drop arguments that they do not know, without a word; padding would be routed.
    """
    if torch.compiler.is_compiling():
        return
    used = [m.statistics for m in model.modules() if isinstance(m, UpcycledFFN) and m.statistics is not None]
    if not all(statistics.masked for statistics in used):
        raise RuntimeError(
            f"the token mask must reach every layer, and {type(model).__name__} of this version of transformers passes "
            "it on to none; upgrade transformers, or set passes_mask=False in the family's row (ummrm/hf/families.py)."
        )


def _flatten_mask(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    flat = x.dim() == 2 and mask.numel() == x.shape[0]  # OPT flattens its tokens before the FFN
    if mask.shape != x.shape[:-1] and not flat:
        raise ValueError(
            f"`token_mask` must have x's leading shape {list(x.shape[:-1])}, got {list(mask.shape)}; "
            "pass one flag per token."
        )
    return mask.reshape(-1).to(torch.bool)


def _check_type(argument: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"`{argument}` must be a {expected.__name__}, got {type(value).__name__}.")
