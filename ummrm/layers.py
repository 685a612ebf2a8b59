"""The drop-in modules: Experts, UpcycledFFN (training phase) and MergedFFN (merge phase); the router is in router.py.

Each is a plain `nn.Module` that works in any training loop, with no Hugging Face class around it. They hold
parameters, call `ops`, and keep the statistics of their last forward for the auxiliary losses; how a whole model is
upcycled or merged is `upcycle.py`'s and `merge.py`'s business.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from . import ops
from .config import MergeConfig, UpcycleConfig
from .dense import DenseFFN, FFNPaths, FFNSpec
from .probe import find_paths, prove_paths
from .router import Router, RouterStatistics, in_backward


class Experts(nn.Module):
    """The stacked parameters of n experts of one layer; they are run by `ops.moe_ffn` and `ops.merged_ffn`.

    Its forward hands out the parameters. The layers read them that way, never by attribute, since adapters on
    parameters (PEFT's `target_parameters`) and sharding put the effective tensors in place for a forward only.

    Parameters: `gate_up_proj` [n, 2I, H] (gate rows first) for a gated FFN or `up_proj` [n, I, H] for a plain one,
    `down_proj` [n, H, I], and `<name>_bias` [n, rows] where the dense FFN had biases.
    """

    def __init__(
        self,
        num_experts: int,
        spec: FFNSpec,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.spec = num_experts, spec

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, dtype=dtype, device=device))

        self.up_name = "gate_up_proj" if spec.glu else "up_proj"
        self.register_parameter(self.up_name, parameter(spec.up_rows, spec.hidden_size))
        self.down_proj = parameter(spec.hidden_size, spec.intermediate_size)
        self.register_parameter(f"{self.up_name}_bias", parameter(spec.up_rows) if spec.up_bias else None)
        self.register_parameter("down_proj_bias", parameter(spec.hidden_size) if spec.down_bias else None)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The effective `up`, `down`, `up_bias`, `down_bias`, absent ones None; x is for wrappers of a forward."""
        return {"up": self.up, "down": self.down_proj, "up_bias": self.up_bias, "down_bias": self.down_proj_bias}

    def reset_parameters(self, std: float = 0.02, normal_=nn.init.normal_, zeros_=nn.init.zeros_) -> None:
        """Random experts: normal weights, zero biases. Upcycling fills them with copies instead."""
        for name, tensor in self.tensors().items():
            if name.endswith("bias"):
                zeros_(tensor)
            else:
                normal_(tensor, std=std)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Present parameters under the layout-independent names `up`, `down`, `up_bias`, `down_bias`."""
        named = {"up": self.up, "down": self.down_proj, "up_bias": self.up_bias, "down_bias": self.down_proj_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def up(self) -> nn.Parameter:
        """[n, 2I or I, H]"""
        return getattr(self, self.up_name)

    @property
    def up_bias(self) -> nn.Parameter | None:
        """[n, 2I or I], or None."""
        return getattr(self, f"{self.up_name}_bias")

    @torch.no_grad()
    def copy_from(self, ffn: DenseFFN, noise: float = 0.0) -> None:
        """Makes every expert a copy of `ffn`, plus normal noise of `noise` times each weight's own std."""
        fused = ffn.fused()
        for name, tensor in self.tensors().items():
            tensor.copy_(fused[name].unsqueeze(0).expand_as(tensor))
            if noise > 0 and not name.endswith("bias"):
                std = noise * fused[name].float().std().item()
                tensor.add_((torch.randn_like(tensor, dtype=torch.float32) * std).to(tensor.dtype))

    def extra_repr(self) -> str:
        s = self.spec
        kind = f"{'gated' if s.glu else 'plain'} {s.activation}"
        return (
            f"{self.num_experts} x ({s.hidden_size} to {s.intermediate_size}, {kind}, biases={s.up_bias}/{s.down_bias})"
        )


def _expert_arguments(shared: Experts, routed: Experts, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    groups = {"shared": shared(x), "routed": routed(x)}
    return {f"{group}_{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


class UpcycledFFN(nn.Module):
    """A dense FFN upcycled into E routed experts, K active per token, and S always-on shared experts.

    A drop-in replacement: [..., H] in, [..., H] out. `UpcycledFFN.from_dense` makes one from an existing FFN; at that
    moment it computes exactly what the FFN did. After each forward `statistics` holds what the auxiliary losses need
    (`ummrm.auxiliary_loss`).

    Args:
        spec: shape and kind of the FFN.
        config: number of experts, router, gate.
        dtype: of the experts; the router is always fp32.
        device: where parameters are created.
    """

    def __init__(
        self,
        spec: FFNSpec,
        config: UpcycleConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.router = Router(spec.hidden_size, config, device)
        self.experts = Experts(config.num_experts, spec, dtype, device)
        self.shared_experts = Experts(config.num_shared_experts, spec, dtype, device)
        for experts in (self.experts, self.shared_experts):
            experts.reset_parameters()
        self.statistics: RouterStatistics | None = None
        self.token_mask: torch.Tensor | None = None  # set for one call by a model's layer; the argument wins
        self._dense_template: tuple[nn.Module, FFNPaths] | None = None

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
        if isinstance(ffn, (UpcycledFFN, MergedFFN)):
            raise ValueError(f"`ffn` must be a dense FFN, got a {type(ffn).__name__}; it is upcycled already.")
        paths = find_paths(ffn) if paths is None else prove_paths(ffn, paths)
        dense = paths.read(ffn)
        weight = dense.up.weight
        upcycled = cls(dense.spec, config, dtype=weight.dtype, device=weight.device)
        upcycled.copy_experts(dense)
        upcycled._dense_template = (copy.deepcopy(ffn).to("meta"), paths)
        return upcycled.train(ffn.training)

    def copy_experts(self, dense: DenseFFN) -> None:
        """Fills all experts with copies of `dense`; only routed experts get `config.expert_noise`."""
        self.shared_experts.copy_from(dense)
        self.experts.copy_from(dense, self.config.expert_noise)

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the layer.

        Args:
            x: [..., H].
            token_mask: bool of x's leading shape, True for live tokens, False for padding; for a flat x, [T, H], any
                shape of T flags. A masked token is computed by the shared experts alone and counts in no statistic.

        Returns:
            [..., H] in x's dtype (the autocast dtype under autocast).
        """
        flat = _flatten(x, self.spec.hidden_size)
        mask = _flatten_mask(self.token_mask if token_mask is None else token_mask, x)
        routing = self.router(flat, mask)
        if not in_backward():
            self.statistics = RouterStatistics(
                routing.tokens_per_expert,
                routing.mean_prob,
                routing.mean_z,
                self.config.num_experts_per_tok,
                routing.shared_weight.detach(),
                mask is not None,
            )
        out = ops.moe_ffn(
            flat,
            routing.shared_weight,
            routing.routed_weights,
            routing.expert_indices,
            **_expert_arguments(self.shared_experts, self.experts, flat),
            activation=self.spec.activation,
            glu=self.spec.glu,
        )
        return out.view(x.shape)

    def __getstate__(self) -> dict:
        # Statistics carry a graph, which can be neither copied nor pickled, and belong to this module's last forward.
        return {**self.__dict__, "statistics": None, "token_mask": None}


class MergeShare(nn.Module):
    """lambda, the shared experts' share of the merge: one scalar for a model, fixed or learned as sigmoid(l)."""

    def __init__(self, config: MergeConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        if config.learn_shared_share:
            # one element, not a scalar: sharding libraries refuse parameters without dimensions
            self.logit = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device))
            self.reset_parameters()

    def reset_parameters(self, constant_=nn.init.constant_) -> None:
        """Starts a learnable lambda at `config.shared_share`."""
        if self.config.learn_shared_share:
            share = self.config.shared_share
            constant_(self.logit, math.log(share / (1 - share)))

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """lambda, [1], of `like`'s dtype and device."""
        if self.config.learn_shared_share:
            return self.logit.sigmoid().to(like)
        return torch.full((1,), self.config.shared_share, dtype=like.dtype, device=like.device)

    def extra_repr(self) -> str:
        return f"{self.config.shared_share}, learned={self.config.learn_shared_share}"


class MergedFFN(nn.Module):
    """The merge phase of an upcycled FFN: experts folded by learnable weights into one dense FFN on every forward.

    `merged tensor = lambda / S * sum_s W_s + (1 - lambda) * sum_e softmax(alpha)_e W_e`; everything but `alpha` (and
    lambda, if learned) is frozen.

    Args:
        spec: shape and kind of the FFN.
        config: the upcycling configuration it came from.
        merge_config: granularity of alpha.
        share: lambda, held by reference: one for the whole network, registered where `prepare_merge` puts it.
        dtype: of the experts; alpha is fp32.
        device: where parameters are created.
    """

    def __init__(
        self,
        spec: FFNSpec,
        config: UpcycleConfig,
        merge_config: MergeConfig,
        share: MergeShare,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.config, self.merge_config = spec, config, merge_config
        self.experts = Experts(config.num_experts, spec, dtype, device)
        self.shared_experts = Experts(config.num_shared_experts, spec, dtype, device)
        for experts in (self.experts, self.shared_experts):
            experts.reset_parameters()
            experts.requires_grad_(False)
        rows = (spec.num_projections,) if merge_config.alpha_per == "projection" else ()
        self.alpha = nn.Parameter(torch.zeros(*rows, config.num_experts, dtype=torch.float32, device=device))
        self._share = (share,)
        self.token_mask: torch.Tensor | None = None  # layers set it for any FFN; a dense forward has no use for it
        self._dense_template: tuple[nn.Module, FFNPaths] | None = None

    @classmethod
    def from_upcycled(cls, ffn: UpcycledFFN, merge_config: MergeConfig, share: MergeShare) -> MergedFFN:
        """Takes over the experts of `ffn` (no copy, not frozen yet); alpha starts uniform."""
        weight = ffn.experts.down_proj
        with torch.device("meta"):
            merged = cls(ffn.spec, ffn.config, merge_config, share, dtype=weight.dtype)
        merged.experts, merged.shared_experts = ffn.experts, ffn.shared_experts
        merged.alpha = nn.Parameter(torch.zeros(merged.alpha.shape, dtype=torch.float32, device=weight.device))
        merged._dense_template = ffn._dense_template
        return merged.train(ffn.training)

    def coefficients(self) -> torch.Tensor:
        """Merge coefficients [projections, S + E], shared experts first; each row sums to one.

        In fp32 (fp64 for fp64 experts), whatever dtype the network was cast to.
        """
        wide = torch.float64 if self.experts.down_proj.dtype == torch.float64 else torch.float32
        alpha = self.alpha.to(wide)
        share = self._share[0](alpha)
        alpha = alpha if alpha.dim() == 2 else alpha.expand(self.spec.num_projections, -1)
        shared = (share / self.config.num_shared_experts).expand(alpha.shape[0], self.config.num_shared_experts)
        return torch.cat([shared, (1 - share) * alpha.softmax(-1)], dim=-1)

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., H] through the merged dense FFN. `token_mask` is accepted and has no effect: padding is computed."""
        flat = _flatten(x, self.spec.hidden_size)
        out = ops.merged_ffn(
            flat,
            self.coefficients(),
            **_expert_arguments(self.shared_experts, self.experts, flat),
            activation=self.spec.activation,
            glu=self.spec.glu,
        )
        return out.view(x.shape)

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, torch.Tensor]:
        """The dense FFN's tensors, laid out as `DenseFFN.fused`, bit for bit those that `forward` uses."""
        coefficients = self.coefficients()
        up_rows = coefficients[:-1]
        shared, routed, rows = [], [], []
        names: list[str] = []
        for name in self.experts.tensors():
            s, r = self.shared_experts.tensors()[name].detach(), self.experts.tensors()[name].detach()
            parts = len(up_rows) if name.startswith("up") else 1
            shared += s.chunk(parts, dim=1)
            routed += r.chunk(parts, dim=1)
            rows += list(up_rows) if name.startswith("up") else [coefficients[-1]]
            names += [name] * parts
        merged = ops.merge_experts(shared, routed, torch.stack(rows))
        return {n: torch.cat([t for m, t in zip(names, merged, strict=True) if m == n]) for n in dict.fromkeys(names)}

    def to_dense(self) -> nn.Module:
        """A module of the class that `UpcycledFFN.from_dense` was given, holding the merged weights.

        Raises:
            ValueError: this FFN was not made by `from_dense` (a Hugging Face model: use `ummrm.merge(model)`).
        """
        if self._dense_template is None:
            raise ValueError(
                "MergedFFN.to_dense needs the module that UpcycledFFN.from_dense was given, and this one has none; "
                "for a Hugging Face model call ummrm.merge(model) on the whole model."
            )
        template, paths = self._dense_template
        dense = copy.deepcopy(template)
        paths.read(dense).write(self.merged_tensors())
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"alpha_per={self.merge_config.alpha_per!r}"


def upcycled_ffns(model: nn.Module) -> dict[str, UpcycledFFN]:
    """The `UpcycledFFN` modules of a network by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UpcycledFFN)}


def merged_ffns(model: nn.Module) -> dict[str, MergedFFN]:
    """The `MergedFFN` modules of a network by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MergedFFN)}


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
            "it on to none; upgrade transformers, or set passes_mask=False in the family's row (ummrm/families.py)."
        )


def _flatten(x: torch.Tensor, hidden_size: int) -> torch.Tensor:
    if x.dim() == 0 or x.shape[-1] != hidden_size:
        raise ValueError(f"`x` must be [..., {hidden_size}] (the FFN's hidden size), got {list(x.shape)}.")
    return x.reshape(-1, hidden_size)


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
