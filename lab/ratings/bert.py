"""BERTs' top layers side by side: the forward of transformers' BertForSequenceClassification above frozen layers.

The top layer is computed at the first token alone, since the pooler reads nothing else. There is no dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel

from ummrm.hf.families import HF_ACTIVATIONS

from ..backbone.data import Features, MixtureFFN
from ..backbone.replicas import FFN, Parameters
from .top import Rows, TopNetwork, attend


class BertTop(TopNetwork):
    """As `TopNetwork`.

    Raises:
        ValueError: it is no BERT that is computed here.
    """

    def __init__(self, stock: PreTrainedModel, trained_layers: int) -> None:
        super().__init__(stock, trained_layers)
        config = stock.config
        if not isinstance(stock, BertForSequenceClassification) or config.hidden_act not in HF_ACTIVATIONS:
            raise ValueError(
                f"`model` must be a BERT with an activation among {', '.join(HF_ACTIVATIONS)}, got a "
                f"{type(stock).__name__} with {config.hidden_act!r}."
            )
        self.heads, self.eps = config.num_attention_heads, config.layer_norm_eps
        layers, activation = range(trained_layers), HF_ACTIVATIONS[config.hidden_act]
        self.ffns = tuple(
            FFN(f"{i}.up", f"{i}.down", f"{i}.up_bias", f"{i}.down_bias", activation, glu=False) for i in layers
        )
        names = ("q", "kv", "o", "up", "down")
        self.head = ("score", "score_bias")
        self.linears = tuple(f"{i}.{name}{kind}" for i in layers for name in names for kind in ("", "_bias"))
        self.undecayed = frozenset(name for name in self.stock_names() if name.endswith("bias") or ".norm" in name)

    def rewards(
        self,
        parameters: Parameters,
        features: Features,
        shared_weight: float = 0.0,
        mixture: MixtureFFN | None = None,
    ) -> Tensor:
        """`Network.rewards`; the only feature is `text` int64 [R, n], numbers of texts."""
        x, every = self.batch(features)
        for i in range(self.trained_layers):
            one = mixture is None and i == self.trained_layers - 1
            rows = every.single if one else every  # from the queries on
            kv = every.padded(every.linear(x, parameters, f"{i}.kv"))
            x = x.index_select(0, every.first) if one else x
            q = rows.padded(rows.linear(x, parameters, f"{i}.q"))
            q, kv = (t.unflatten(2, (-1, self.hidden_size // self.heads)) for t in (q, kv))
            mixed = attend(q, kv.unflatten(2, (2, -1)), self.heads, every.live.flatten(0, 1)[:, None, None])
            x = x + rows.linear(rows.packed(mixed), parameters, f"{i}.o")
            x = _layer_norm(x, parameters, f"{i}.norm1", rows, self.eps)
            if mixture is None:
                y = rows.ffn(x, parameters, self.ffns[i], shared_weight)
            else:
                y = rows.mixed(x, i, mixture)
            x = _layer_norm(x + y, parameters, f"{i}.norm2", rows, self.eps)
        if mixture is not None:
            x = x.index_select(0, every.first)
        pooled = every.single.linear(x, parameters, "pooler").tanh()
        return every.single.linear(pooled, parameters, "score").view(features["text"].shape)

    def forward_flops(self, length: float, extra_ffns: float = 0.0) -> float:
        """`Network.forward_flops`, of the trained layers as the stock model computes them, every token in each.

        The frozen layers below are the same for every arm, and their output is kept: not counted.
        """
        h, i = self.hidden_size, self.stock.config.intermediate_size
        weights = self.trained_layers * (4 * h * h + (1 + extra_ffns) * 2 * h * i) + (h * h + h) / length
        return 2 * weights + 4 * length * h * self.trained_layers

    def layers(self) -> nn.ModuleList:
        """`TopNetwork.layers`."""
        return self.stock.base_model.encoder.layer

    def stock_names(self) -> dict[str, tuple[str, ...]]:
        """`TopNetwork.stock_names`."""
        names: dict[str, tuple[str, ...]] = {"pooler": ("bert.pooler.dense",), "score": ("classifier",)}
        for i in range(self.trained_layers):
            at = f"bert.encoder.layer.{self.below + i}."
            names |= {
                f"{i}.q": (at + "attention.self.query",),
                f"{i}.kv": (at + "attention.self.key", at + "attention.self.value"),
                f"{i}.o": (at + "attention.output.dense",),
                f"{i}.norm1": (at + "attention.output.LayerNorm",),
                f"{i}.up": (at + "intermediate.dense",),
                f"{i}.down": (at + "output.dense",),
                f"{i}.norm2": (at + "output.LayerNorm",),
            }
        kinds = (("", ".weight"), ("_bias", ".bias"))
        return {
            name + ours: tuple(target + stock for target in targets)
            for name, targets in names.items()
            for ours, stock in kinds
        }


def _layer_norm(x: Tensor, parameters: Parameters, name: str, rows: Rows, eps: float) -> Tensor:
    """Each replica's own layer norm of its rows."""
    each = zip(rows.by_replica(x), parameters[name], parameters[name + "_bias"], strict=True)
    return torch.cat([F.layer_norm(part, weight.shape, weight, bias, eps) for part, weight, bias in each])
