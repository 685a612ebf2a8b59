"""Transformers' top layers side by side, above frozen ones: what any architecture shares here.

What the frozen layers give is computed once for every text, and answers are numbers of texts. Only live tokens are
multiplied: rows stand one after another, grouped by replica and expert, as `ummrm.ops.grouped_linear` takes them (which
for 4 replicas of 704 live rows took 0.7 of a batched product over the 1,024 padded ones).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ummrm import ops

from ..backbone.data import Features, MixtureFFN, Network
from ..backbone.replicas import FFN, Parameters, shared_name


class TopNetwork(Network):
    """A reward model's top layers, norm or pooler, and head.

    Args:
        stock: the reward model, whose lower layers are the frozen ones; kept, and not changed.
        trained_layers: its top layers that are trained.

    Attributes:
        hidden: fp32 [tokens, H], what the frozen layers give for all texts, live tokens alone, one text after another.
        lengths: int64 [texts], tokens of each.
    """

    hidden: Tensor
    lengths: Tensor

    def __init__(self, stock: PreTrainedModel, trained_layers: int) -> None:
        config = stock.config
        if not 1 <= trained_layers <= config.num_hidden_layers:
            raise ValueError(f"`trained_layers` must be 1 to {config.num_hidden_layers}, got {trained_layers}.")
        self.stock, self.trained_layers, self.hidden_size = stock, trained_layers, config.hidden_size
        self.below = config.num_hidden_layers - trained_layers

    @abstractmethod
    def stock_names(self) -> dict[str, tuple[str, ...]]:
        """The stock parameters that each of ours is, one under another."""

    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The stock model's layers."""

    def read(self, hidden: Tensor, lengths: Tensor) -> None:
        """Takes what the frozen layers gave for all texts."""
        self.hidden, self.lengths, self._starts = hidden, lengths, lengths.cumsum(0) - lengths

    def batch(self, features: Features) -> tuple[Tensor, Rows]:
        """What the first trained layer reads of texts [R, n], packed, and where it stands."""
        text = features["text"]
        lengths = self.lengths[text]
        width = int(self.lengths.max())  # of all texts, so that a replica's arithmetic doesn't depend on the others
        live = torch.arange(width) < lengths[..., None]
        at = live.flatten().nonzero()[:, 0]
        index = (self._starts[text][..., None] + torch.arange(width)).flatten()[at]
        return self.hidden.index_select(0, index), Rows(lengths, live, at)

    # ---- stock models ------------------------------------------------------------------------------------------

    def frozen(self) -> dict[str, Tensor]:
        """The stock model's tensors that are not trained."""
        trained = {target for targets in self.stock_names().values() for target in targets}
        return {name: value for name, value in self.stock.state_dict().items() if name not in trained}

    def fresh_head(self, generators: list[torch.Generator]) -> Parameters:
        """`Network.fresh_head`."""
        std = self.stock.config.initializer_range
        made = {"score": torch.stack([torch.randn(1, self.hidden_size, generator=g) * std for g in generators])}
        return made | ({"score_bias": torch.zeros(len(generators), 1)} if "score_bias" in self.stock_names() else {})

    def with_head(self, generators: list[torch.Generator]) -> Parameters:
        """The pretrained layers, once for each generator, and a fresh head from it."""
        pretrained = self.from_stock(self.stock).items()
        made = {name: value.repeat(len(generators), *[1] * (value.dim() - 1)) for name, value in pretrained}
        return made | self.fresh_head(generators)

    def to_stock(self, parameters: Parameters, replica: int) -> PreTrainedModel:
        """One replica as a stock reward model, its frozen layers included."""
        model = copy.deepcopy(self.stock)
        state = {}
        for name, targets in self.stock_names().items():
            parts = parameters[name][replica].detach().chunk(len(targets))
            state |= {target: part.clone() for target, part in zip(targets, parts, strict=True)}
        _, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        return model.eval()

    def from_stock(self, model: PreTrainedModel) -> Parameters:
        """One replica, [1, ...], of a stock reward model with the same frozen layers."""
        state, names = model.state_dict(), self.stock_names()
        return {name: torch.cat([state[t] for t in targets])[None].clone() for name, targets in names.items()}


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch stand: replica by replica, within one text by text, within one token by token.

    Attributes:
        lengths: int64 [R, n], tokens of each text.
        live: bool [R, n, width], when padded.
        at: int64 [rows], where each row stands among the R * n * width padded ones.
    """

    lengths: Tensor
    live: Tensor
    at: Tensor

    @property
    def first(self) -> Tensor:
        """int64 [R * n], the row of each text's first token."""
        return self.last - self.lengths.flatten() + 1

    @property
    def last(self) -> Tensor:
        """int64 [R * n], the row of each text's last token."""
        return self.lengths.flatten().cumsum(0) - 1

    @property
    def single(self) -> Rows:
        """The rows of one token of each text."""
        once = torch.ones_like(self.lengths)
        return Rows(once, once[..., None].bool(), torch.arange(once.numel()))

    def padded(self, x: Tensor) -> Tensor:
        """[R * n, width, D] of rows [rows, D], zeros where there is none."""
        padded = x.new_zeros(self.live.numel(), x.shape[1]).index_copy(0, self.at, x)
        return padded.view(-1, self.live.shape[2], x.shape[1])

    def packed(self, x: Tensor) -> Tensor:
        """Rows [rows, D] of what is padded, [..., D]."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.at)

    def linear(self, x: Tensor, parameters: Parameters, name: str) -> Tensor:
        """Each replica's or expert's rows by its own weight: [rows, N].

        Args:
            x: [rows, D].
            parameters: weight [R, N, D], or [R, E, N, D]: the first n / E texts are the first expert's, and so on.
            name: of the weight; the bias, where there is one, is `name`_bias.
        """
        weight, bias = parameters[name], parameters.get(name + "_bias")
        groups = self.lengths.sum(1)
        if weight.dim() == 4:
            groups = self.lengths.view(*weight.shape[:2], -1).sum(2).flatten()
            weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1)
        return ops.grouped_linear(x, weight, F.pad(groups.cumsum(0), (1, 0)).int(), bias)

    def ffn(self, x: Tensor, parameters: Parameters, names: FFN, shared_weight: float) -> Tensor:
        """The FFN of each replica or expert, mixed with a shared expert's if there is one."""

        def one(up: str, down: str) -> Tensor:
            hidden = ops.activation(self.linear(x, parameters, up), names.activation, names.glu)
            return self.linear(hidden, parameters, down)

        routed = one(names.up, names.down)
        if not shared_weight:
            return routed
        return shared_weight * one(shared_name(names.up), shared_name(names.down)) + (1 - shared_weight) * routed

    def mixed(self, x: Tensor, layer: int, mixture: MixtureFFN) -> Tensor:
        """The token mixture in an FFN's place."""
        replicas = len(self.lengths)
        padded = self.padded(x).view(replicas, -1, x.shape[1])
        return self.packed(mixture(layer, padded, self.live.view(replicas, -1)))

    def by_replica(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each replica's rows."""
        return x.split(self.lengths.sum(1).tolist())


def attend(q: Tensor, kv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Attention within each text.

    Args:
        q: [texts, queries, heads, D].
        kv: [texts, width, 2, groups, D], keys and values; heads of a group share them.
        heads: number of heads.
        mask: bool, of keys that a query sees; None: those at its place and before.

    Returns:
        [texts, queries, heads * D].
    """
    k, v = kv.permute(2, 0, 3, 1, 4)
    if k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
    return mixed.transpose(1, 2).flatten(2)
