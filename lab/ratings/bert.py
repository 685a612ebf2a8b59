"""BERTs' top layers side by side: the forward of transformers' BertForSequenceClassification above frozen layers.

What the frozen layers give is computed once for every text, and answers are numbers of texts. Only live tokens are
multiplied: rows stand one after another, grouped by replica and expert, as `ummrm.ops.grouped_linear` takes them (which
for 4 replicas of 704 live rows took 0.7 of a batched product over the 1,024 padded ones). The top layer is computed at
the first token alone, since the pooler reads nothing else. There is no dropout.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel

from ummrm import ops

from ..backbone.data import Features, MixtureFFN, Network
from ..backbone.replicas import FFN, Parameters, shared_name

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}  # theirs: ours


class BertTop(Network):
    """The network of real ratings.

    Args:
        stock: a reward model with a BERT, whose lower layers are the frozen ones; kept, and not changed.
        trained_layers: its top layers that are trained, with pooler and head.
        hidden: fp32 [tokens, H], what the frozen layers give for all texts, live tokens alone, one text after another.
        lengths: int64 [texts], tokens of each.

    Raises:
        ValueError: it is no BERT that the laboratory can run side by side, or it has fewer layers.
    """

    def __init__(self, stock: PreTrainedModel, trained_layers: int, hidden: Tensor, lengths: Tensor) -> None:
        check_bert(stock, trained_layers)
        config = stock.config
        self.stock, self.trained_layers = stock, trained_layers
        self.hidden, self.lengths = hidden, lengths
        self.starts = lengths.cumsum(0) - lengths
        self.hidden_size, self.heads, self.eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        layers = range(trained_layers)
        activation = _ACTIVATIONS[config.hidden_act]
        self.ffns = tuple(
            FFN(f"{i}.up", f"{i}.down", f"{i}.up_bias", f"{i}.down_bias", activation, glu=False) for i in layers
        )
        names = ("q", "kv", "o", "up", "down")
        self.linears = tuple(f"{i}.{name}{kind}" for i in layers for name in names for kind in ("", "_bias"))
        stock_names = self._stock_names()
        self.undecayed = frozenset(name for name in stock_names if name.endswith("bias") or ".norm" in name)

    # ---- forward ---------------------------------------------------------------------------------------------

    def rewards(
        self,
        parameters: Parameters,
        features: Features,
        shared_weight: float = 0.0,
        mixture: MixtureFFN | None = None,
    ) -> Tensor:
        """`Network.rewards`; the only feature is `text` int64 [R, n], numbers of texts."""
        text = features["text"]
        replicas, n = text.shape
        lengths = self.lengths[text]
        width = int(self.lengths.max())  # of all texts, so that a replica's arithmetic doesn't depend on the others
        live = torch.arange(width) < lengths[..., None]
        at = live.flatten().nonzero()[:, 0]  # where each row stands when padded
        offsets = (self.starts[text][..., None] + torch.arange(width)).flatten()[at]
        x = self.hidden.index_select(0, offsets)
        ends = lengths.flatten().cumsum(0)
        first = ends - lengths.flatten()
        once = torch.ones_like(lengths)
        for i in range(self.trained_layers):
            only_first = mixture is None and i == self.trained_layers - 1
            rows = once if only_first else lengths  # of each text, from the queries on
            kv = _linear(x, parameters, f"{i}.kv", lengths)
            x = x.index_select(0, first) if only_first else x
            q = _linear(x, parameters, f"{i}.q", rows)
            mixed = self._attend(q, kv, live, at, only_first)
            mixed = x + _linear(mixed, parameters, f"{i}.o", rows)
            x = _layer_norm(mixed, parameters, f"{i}.norm1", rows, self.eps)
            if mixture is None:
                y = _ffn(x, parameters, self.ffns[i], rows, shared_weight)
            else:
                padded = _padded(x, at, live.numel()).view(replicas, n * width, -1)
                y = mixture(i, padded, live.view(replicas, -1)).flatten(0, 1).index_select(0, at)
            x = _layer_norm(x + y, parameters, f"{i}.norm2", rows, self.eps)
        if mixture is not None:
            x = x.index_select(0, first)
        pooled = _linear(x, parameters, "pooler", once).tanh()
        return _linear(pooled, parameters, "score", once).view(replicas, n)

    def _attend(self, q: Tensor, kv: Tensor, live: Tensor, at: Tensor, only_first: bool) -> Tensor:
        """Attention within each text, of its first token's query alone or of all: rows as q has them."""
        replicas, n, width = live.shape
        texts = replicas * n
        k, v = _padded(kv, at, live.numel()).view(texts, width, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        padded = q if only_first else _padded(q, at, live.numel())
        queries = padded.view(texts, -1, self.heads, self.hidden_size // self.heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(queries, k, v, attn_mask=live.view(texts, 1, 1, width))
        mixed = mixed.transpose(1, 2).reshape(-1, self.hidden_size)
        return mixed if only_first else mixed.index_select(0, at)

    def forward_flops(self, length: float, extra_ffns: float = 0.0) -> float:
        """`Network.forward_flops`, of the trained layers as the stock model computes them, every token in each.

        The frozen layers below are the same for every arm, and their output is kept: not counted.
        """
        h, i = self.hidden_size, self.stock.config.intermediate_size
        weights = self.trained_layers * (4 * h * h + (1 + extra_ffns) * 2 * h * i) + (h * h + h) / length
        return 2 * weights + 4 * length * h * self.trained_layers

    # ---- stock models ------------------------------------------------------------------------------------------

    def with_head(self, generators: list[torch.Generator]) -> Parameters:
        """The pretrained layers and pooler, once for each generator, and a fresh head from it."""
        std = self.stock.config.initializer_range
        body = {name: value.repeat(len(generators), *[1] * (value.dim() - 1)) for name, value in self._body().items()}
        head = torch.stack([torch.randn(1, self.hidden_size, generator=g) * std for g in generators])
        return body | {"score": head, "score_bias": torch.zeros(len(generators), 1)}

    def to_stock(self, parameters: Parameters, replica: int) -> BertForSequenceClassification:
        """One replica as a stock reward model, its frozen layers included."""
        model = copy.deepcopy(self.stock)
        state = {}
        for name, targets in self._stock_names().items():
            parts = parameters[name][replica].detach().chunk(len(targets))
            state |= {target: part.clone() for target, part in zip(targets, parts, strict=True)}
        _, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        return model.eval()

    def from_stock(self, model: PreTrainedModel) -> Parameters:
        """One replica, [1, ...], of a stock reward model with the same frozen layers."""
        state = model.state_dict()
        return {
            name: torch.cat([state[t] for t in targets])[None].clone() for name, targets in self._stock_names().items()
        }

    def _body(self) -> Parameters:
        return {name: value for name, value in self.from_stock(self.stock).items() if not name.startswith("score")}

    def _stock_names(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {"pooler": ("bert.pooler.dense",), "score": ("classifier",)}
        below = self.stock.config.num_hidden_layers - self.trained_layers
        for i in range(self.trained_layers):
            at = f"bert.encoder.layer.{below + i}."
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
            name + ours: tuple(t + stock for t in targets) for name, targets in names.items() for ours, stock in kinds
        }


def check_bert(stock: PreTrainedModel, trained_layers: int) -> None:
    """Refuses a model whose top layers this module doesn't compute."""
    config = stock.config
    if not isinstance(stock, BertForSequenceClassification) or config.num_labels != 1:
        raise ValueError(f"`model` must be a BERT with one score, got {type(stock).__name__}.")
    if config.hidden_act not in _ACTIVATIONS or getattr(config, "is_decoder", False):
        raise ValueError(
            f"`model` must be an encoder with an activation among {', '.join(_ACTIVATIONS)}, got {config.hidden_act!r}."
        )
    if not 1 <= trained_layers <= config.num_hidden_layers:
        raise ValueError(f"`trained_layers` must be 1 to {config.num_hidden_layers}, got {trained_layers}.")


def _linear(x: Tensor, parameters: Parameters, name: str, rows: Tensor) -> Tensor:
    """Each replica's or expert's rows by its own weight: [rows, N].

    Args:
        x: [rows, D], replica by replica, and within one text by text.
        parameters: weight [R, N, D], or [R, E, N, D]: the first n / E texts are the first expert's, and so on.
        name: of the weight.
        rows: int64 [R, n] of each text.
    """
    weight, bias = parameters[name], parameters[name + "_bias"]
    groups = rows.sum(1)
    if weight.dim() == 4:
        groups = rows.view(*weight.shape[:2], -1).sum(2).flatten()
        weight, bias = weight.flatten(0, 1), bias.flatten(0, 1)
    return ops.grouped_linear(x, weight, F.pad(groups.cumsum(0), (1, 0)).int(), bias)


def _ffn(x: Tensor, parameters: Parameters, names: FFN, rows: Tensor, shared_weight: float) -> Tensor:
    """The FFN of each replica or expert, mixed with a shared expert's if there is one."""

    def one(up: str, down: str) -> Tensor:
        hidden = ops.activation(_linear(x, parameters, up, rows), names.activation, names.glu)
        return _linear(hidden, parameters, down, rows)

    routed = one(names.up, names.down)
    if not shared_weight:
        return routed
    return shared_weight * one(shared_name(names.up), shared_name(names.down)) + (1 - shared_weight) * routed


def _layer_norm(x: Tensor, parameters: Parameters, name: str, rows: Tensor, eps: float) -> Tensor:
    """Each replica's own layer norm of its rows."""
    each = zip(x.split(rows.sum(1).tolist()), parameters[name], parameters[name + "_bias"], strict=True)
    return torch.cat([F.layer_norm(part, weight.shape, weight, bias, eps) for part, weight, bias in each])


def _padded(x: Tensor, at: Tensor, size: int) -> Tensor:
    """Rows at their places among `size`, zeros elsewhere."""
    return x.new_zeros(size, x.shape[1]).index_copy(0, at, x)
