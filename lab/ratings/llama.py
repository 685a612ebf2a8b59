"""Llamas' top layers side by side: the forward of transformers' LlamaForSequenceClassification above frozen layers.

Rewards are read at each text's last token, and the top layer is computed there alone. `backbone.llama` is the small
Llama of the synthetic language, trained whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, PreTrainedModel

from ..backbone.data import Features, MixtureFFN
from ..backbone.llama import rotated
from ..backbone.replicas import FFN, Parameters
from .top import Rows, TopNetwork, attend


class LlamaTop(TopNetwork):
    """As `TopNetwork`.

    Raises:
        ValueError: it is no Llama that is computed here.
    """

    def __init__(self, stock: PreTrainedModel, trained_layers: int) -> None:
        super().__init__(stock, trained_layers)
        config = stock.config
        plain = isinstance(stock, LlamaForSequenceClassification) and config.rope_parameters["rope_type"] == "default"
        if not plain or config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
            raise ValueError(
                "`model` must be a Llama without biases, with silu and plain rotary embeddings, got a "
                f"{type(stock).__name__}."
            )
        self.heads, self.groups, self.eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
        self.head_dim = config.head_dim
        layers = range(trained_layers)
        self.ffns = tuple(FFN(f"{i}.up", f"{i}.down") for i in layers)
        self.head = ("score",)
        self.linears = tuple(f"{i}.{name}" for i in layers for name in ("q", "kv", "o", "up", "down"))
        self.undecayed = frozenset(name for name in self.stock_names() if "norm" in name)

    def rewards(
        self,
        parameters: Parameters,
        features: Features,
        shared_weight: float = 0.0,
        mixture: MixtureFFN | None = None,
    ) -> Tensor:
        """`Network.rewards`; the only feature is `text` int64 [R, n], numbers of texts."""
        x, every = self.batch(features)
        cos, sin = self._rotary(every.live.shape[2])
        for i in range(self.trained_layers):
            one = mixture is None and i == self.trained_layers - 1
            rows = every.single if one else every  # from the queries on
            normed = _rms_norm(x, parameters[f"{i}.norm1"], every, self.eps)
            kv = every.padded(every.linear(normed, parameters, f"{i}.kv"))
            kv = kv.unflatten(2, (2, self.groups, self.head_dim))
            k = kv[:, :, 0] * cos + rotated(kv[:, :, 0]) * sin
            if one:
                x, normed = (t.index_select(0, every.last) for t in (x, normed))
            q = rows.padded(rows.linear(normed, parameters, f"{i}.q")).unflatten(2, (-1, self.head_dim))
            at_q = ((t[every.lengths.flatten() - 1][:, None] if one else t) for t in (cos, sin))
            of_cos, of_sin = at_q
            q = q * of_cos + rotated(q) * of_sin
            mask = every.live.flatten(0, 1)[:, None, None] if one else None
            mixed = attend(q, torch.stack([k, kv[:, :, 1]], 2), self.heads, mask)
            x = x + rows.linear(rows.packed(mixed), parameters, f"{i}.o")
            normed = _rms_norm(x, parameters[f"{i}.norm2"], rows, self.eps)
            if mixture is None:
                x = x + rows.ffn(normed, parameters, self.ffns[i], shared_weight)
            else:
                x = x + rows.mixed(normed, i, mixture)
        if mixture is not None:
            x = x.index_select(0, every.last)
        x = _rms_norm(x, parameters["norm"], every.single, self.eps)
        return every.single.linear(x, parameters, "score").view(features["text"].shape)

    def _rotary(self, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [width, 1, D]."""
        half = self.head_dim // 2
        theta = self.stock.config.rope_parameters["rope_theta"]
        frequencies = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(width, dtype=torch.float32)[:, None] * frequencies
        angles = torch.cat([angles, angles], 1)[:, None]
        return angles.cos(), angles.sin()

    def forward_flops(self, length: float, extra_ffns: float = 0.0) -> float:
        """`Network.forward_flops`, of the trained layers, as `BertTop.forward_flops` has it."""
        h, i, d = self.hidden_size, self.stock.config.intermediate_size, self.head_dim
        attention = 2 * h * d * (self.heads + self.groups)
        weights = self.trained_layers * (attention + (1 + extra_ffns) * 3 * h * i) + h
        return 2 * weights + 4 * length * d * self.heads * self.trained_layers

    def layers(self) -> nn.ModuleList:
        """`TopNetwork.layers`."""
        return self.stock.base_model.layers

    def stock_names(self) -> dict[str, tuple[str, ...]]:
        """`TopNetwork.stock_names`."""
        names: dict[str, tuple[str, ...]] = {"norm": ("model.norm.weight",), "score": ("score.weight",)}
        for i in range(self.trained_layers):
            at = f"model.layers.{self.below + i}."
            names |= {
                f"{i}.norm1": (at + "input_layernorm.weight",),
                f"{i}.norm2": (at + "post_attention_layernorm.weight",),
                f"{i}.q": (at + "self_attn.q_proj.weight",),
                f"{i}.kv": (at + "self_attn.k_proj.weight", at + "self_attn.v_proj.weight"),
                f"{i}.o": (at + "self_attn.o_proj.weight",),
                f"{i}.up": (at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
                f"{i}.down": (at + "mlp.down_proj.weight",),
            }
        return names


def _rms_norm(x: Tensor, weights: Tensor, rows: Rows, eps: float) -> Tensor:
    """Each replica's own norm of its rows."""
    each = zip(rows.by_replica(x), weights, strict=True)
    return torch.cat([F.rms_norm(part, weight.shape, weight, eps) for part, weight in each])
