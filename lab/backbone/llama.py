"""Small Llamas side by side: the forward of transformers' LlamaForSequenceClassification and LlamaForCausalLM.

Any replica converts to a stock model and back. Three projections are fused (`qkv`, and gate and up as in `ummrm.ops`);
rewards of the last layer are computed at each answer's last token alone, since nothing else of it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from .data import Features, MixtureFFN, Network
from .replicas import FFN, Parameters, ffn, linear, rms_norm


@dataclass(frozen=True)
class LlamaShape:
    """Size of the model.

    Attributes:
        hidden_size: H.
        intermediate_size: I.
        num_layers: layers.
        num_heads: attention heads.
        longest: positions.
        rope_theta: base of the rotary embedding.
        eps: of the norms.
    """

    hidden_size: int = 32
    intermediate_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    longest: int = 32
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"LlamaShape: `hidden_size` must be a multiple of 2 * num_heads={2 * self.num_heads}, "
                f"got {self.hidden_size}."
            )


class Llama(Network):
    """The network of the synthetic regimes.

    Args:
        shape: its size.
        vocab_size: tokens are below it.
        pad_token_id: the padding token.
    """

    def __init__(self, shape: LlamaShape, vocab_size: int, pad_token_id: int) -> None:
        self.shape, self.vocab_size, self.pad_token_id = shape, vocab_size, pad_token_id
        self.hidden_size = shape.hidden_size
        layers = range(shape.num_layers)
        self.ffns = tuple(FFN(f"{i}.up", f"{i}.down") for i in layers)
        self.linears = tuple(f"{i}.{name}" for i in layers for name in ("qkv", "o", "up", "down"))
        self.head = ("score",)
        self.undecayed = frozenset(["norm", *(f"{i}.{name}" for i in layers for name in ("norm1", "norm2"))])
        half = shape.hidden_size // shape.num_heads // 2
        frequencies = 1.0 / shape.rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(shape.longest, dtype=torch.float32)[:, None] * frequencies
        self._cos, self._sin = (f(torch.cat([angles, angles], 1)) for f in (torch.cos, torch.sin))

    # ---- forward ---------------------------------------------------------------------------------------------

    def rewards(
        self,
        parameters: Parameters,
        features: Features,
        shared_weight: float = 0.0,
        mixture: MixtureFFN | None = None,
    ) -> Tensor:
        """`Network.rewards`; features are `tokens` int64 [R, n, T], padded on the right, and `lengths` int64 [R, n]."""
        lengths = features["lengths"]
        hidden = self._hidden(parameters, features["tokens"], lengths, shared_weight, mixture, last=True)
        return linear(hidden, parameters["score"])[..., 0]

    def next_token_loss(self, parameters: Parameters, features: Features) -> Tensor:
        """Cross entropy of each answer's tokens given those before, the prompt's two not counted: [R]."""
        tokens, lengths = features["tokens"], features["lengths"]
        replicas, n, width = tokens.shape
        hidden = self._hidden(parameters, tokens, lengths, 0.0, None, last=False)
        logits = linear(hidden, parameters["lm_head"]).view(replicas, n, width, -1)[:, :, 1:-1]
        counted = torch.arange(2, width) < lengths[..., None]
        loss = F.cross_entropy(logits.flatten(0, 2), tokens[:, :, 2:].flatten(), reduction="none")
        return (loss.view(counted.shape) * counted).sum((1, 2)) / counted.sum((1, 2))

    def _hidden(
        self,
        parameters: Parameters,
        tokens: Tensor,
        lengths: Tensor,
        shared_weight: float,
        mixture: MixtureFFN | None,
        last: bool,
    ) -> Tensor:
        """Normed hidden states: [R, n*T, H], or with `last` [R, n, H] at each answer's last token."""
        replicas, n, width = tokens.shape
        eps, heads = self.shape.eps, self.shape.num_heads
        rows = tokens + self.vocab_size * torch.arange(replicas)[:, None, None]
        x = F.embedding(rows.reshape(replicas, -1), parameters["embed"].flatten(0, 1))
        at_end = (torch.arange(n) * width + lengths - 1)[..., None].expand(-1, -1, self.hidden_size)
        live = (torch.arange(width) < lengths[..., None]).reshape(replicas, -1)
        cos, sin = self._cos[:width], self._sin[:width]
        for i in range(self.shape.num_layers):
            only_end = last and mixture is None and i == self.shape.num_layers - 1
            normed = rms_norm(x, parameters[f"{i}.norm1"], eps)
            qkv = linear(normed, parameters[f"{i}.qkv"])
            q, k, v = qkv.view(replicas * n, width, 3, heads, -1).permute(2, 0, 3, 1, 4)
            q, k = (y * cos + rotated(y) * sin for y in (q, k))
            if only_end:
                end = (lengths.reshape(-1, 1, 1, 1) - 1).expand(-1, heads, 1, q.shape[-1])
                mask = live.view(replicas * n, 1, 1, width)
                mixed = F.scaled_dot_product_attention(q.gather(2, end), k, v, attn_mask=mask)
                x = x.gather(1, at_end)
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.transpose(1, 2).reshape(replicas, -1, self.hidden_size)
            x = x + linear(mixed, parameters[f"{i}.o"])
            normed = rms_norm(x, parameters[f"{i}.norm2"], eps)
            x = x + (
                ffn(parameters, self.ffns[i], normed, shared_weight) if mixture is None else mixture(i, normed, live)
            )
        if last and mixture is not None:
            x = x.gather(1, at_end)
        return rms_norm(x, parameters["norm"], eps)

    def forward_flops(self, length: Tensor, extra_ffns: float = 0.0) -> Tensor:
        """`Network.forward_flops`."""
        s = self.shape
        ffn_weights = 3 * s.hidden_size * s.intermediate_size
        weights = s.num_layers * (4 * s.hidden_size**2 + (1 + extra_ffns) * ffn_weights) + s.hidden_size
        return 2 * weights + 4 * length * s.hidden_size * s.num_layers

    # ---- initialisation and stock models -----------------------------------------------------------------------

    def initial(self, generators: list[torch.Generator]) -> Parameters:
        """Fresh language models, one from each generator; what adds to the residual stream starts at half the size."""
        s = self.shape
        sizes: dict[str, tuple[tuple[int, ...], float]] = {"embed": ((self.vocab_size, s.hidden_size), 0.3)}
        for i in range(s.num_layers):
            sizes[f"{i}.qkv"] = ((3 * s.hidden_size, s.hidden_size), 0.15)
            sizes[f"{i}.o"] = ((s.hidden_size, s.hidden_size), 0.08)
            sizes[f"{i}.up"] = ((2 * s.intermediate_size, s.hidden_size), 0.15)
            sizes[f"{i}.down"] = ((s.hidden_size, s.intermediate_size), 0.08)
        sizes["lm_head"] = ((self.vocab_size, s.hidden_size), 0.1)
        made = {
            name: torch.stack([torch.randn(shape, generator=g) * std for g in generators])
            for name, (shape, std) in sizes.items()
        }
        return made | {name: torch.ones(len(generators), s.hidden_size) for name in sorted(self.undecayed)}

    def fresh_head(self, generators: list[torch.Generator]) -> Parameters:
        """`Network.fresh_head`."""
        return {"score": torch.stack([torch.randn(1, self.hidden_size, generator=g) * 0.05 for g in generators])}

    def with_head(self, backbone: Parameters, generators: list[torch.Generator]) -> Parameters:
        """Reward models from language models: the language head dropped, a fresh reward head from each generator."""
        body = {name: value for name, value in backbone.items() if name != "lm_head"}
        return body | self.fresh_head(generators)

    def to_stock(self, parameters: Parameters, replica: int) -> PreTrainedModel:
        """One replica as LlamaForSequenceClassification, or LlamaForCausalLM where it has a language head."""
        s = self.shape
        kind = LlamaForCausalLM if "lm_head" in parameters else LlamaForSequenceClassification
        options: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": s.hidden_size,
            "intermediate_size": s.intermediate_size,
            "num_hidden_layers": s.num_layers,
            "num_attention_heads": s.num_heads,
            "num_key_value_heads": s.num_heads,
            "max_position_embeddings": s.longest,
            "rms_norm_eps": s.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": s.rope_theta},
            "pad_token_id": self.pad_token_id,
            "num_labels": 1,
            "tie_word_embeddings": False,
        }
        model = kind(LlamaConfig(**options))
        state: dict[str, Tensor] = {}
        for name, targets in self._stock_names("lm_head" in parameters).items():
            parts = parameters[name][replica].detach().chunk(len(targets))
            state |= {target: part.clone() for target, part in zip(targets, parts, strict=True)}
        model.load_state_dict(state)
        return model.eval()

    def from_stock(self, model: PreTrainedModel) -> Parameters:
        """One replica, [1, ...], of a stock model of this shape."""
        state = model.state_dict()
        names = self._stock_names(isinstance(model, LlamaForCausalLM))
        return {name: torch.cat([state[t] for t in targets])[None].clone() for name, targets in names.items()}

    def _stock_names(self, causal: bool) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {"embed": ("model.embed_tokens.weight",), "norm": ("model.norm.weight",)}
        for i in range(self.shape.num_layers):
            at = f"model.layers.{i}."
            names |= {
                f"{i}.norm1": (at + "input_layernorm.weight",),
                f"{i}.norm2": (at + "post_attention_layernorm.weight",),
                f"{i}.qkv": tuple(f"{at}self_attn.{p}_proj.weight" for p in "qkv"),
                f"{i}.o": (at + "self_attn.o_proj.weight",),
                f"{i}.up": (at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
                f"{i}.down": (at + "mlp.down_proj.weight",),
            }
        return names | ({"lm_head": ("lm_head.weight",)} if causal else {"score": ("score.weight",)})


def rotated(x: Tensor) -> Tensor:
    """transformers' `rotate_half`."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
