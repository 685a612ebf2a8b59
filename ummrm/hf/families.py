"""One row for each Hugging Face family: where its layers are, and where a layer keeps its FFN.

A row is all that `modeling.py`, `upcycle.py` and `merge.py` know about an architecture. To add a family, add a row
here and one tiny config to the family test; docs/families.md says what each field means.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..nn.dense import DenseFFN, FFNPaths

# transformers' activation names (transformers.activations.ACT2FN) for what the kernels compute
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers is upcycled.

    Attributes:
        model_type: transformers' name, e.g. `"llama"`.
        paths: the projections of a layer's dense FFN, below the layer.
        layers: path of the list of layers below the backbone (the model's `base_model`).
        site: where the upcycled FFN stands, below the layer; what stands there is called with [..., H] and returns it.
        bypass: submodules that become the identity, for an FFN that is no module of its own, or whose module does more
            (a dropout after the down projection): the site is then the down projection, and all before it is bypassed.
        activation: the config field that names the activation.
        masked: path below the backbone of the module that is called with the [batch, sequence] attention mask; ""
            is the backbone itself. OPT's heads call the backbone's decoder and leave the backbone out.
        passes_mask: whether that module passes keyword arguments that it does not know on to its layers. If not, the
            token mask is handed to the layers beside the call.
        rope_keys_v4: pairs (config key that transformers 4 reads, dotted key of transformers 5's `rope_parameters`), so
            that an exported model keeps its rotary base in tools that pin transformers 4.
        rope_scaling_keys_v4: the keys that transformers 4 takes in `rope_scaling` where it takes no others (`type` is
            its old name for `rope_type`); None takes all but those of `rope_keys_v4`, () writes no `rope_scaling`.
        refused: config fields that must have a given value, with the reason; anything else is a clear error.
    """

    model_type: str
    paths: FFNPaths
    layers: str = "layers"
    site: str = "mlp"
    bypass: tuple[str, ...] = ()
    activation: str = "hidden_act"
    masked: str = ""
    passes_mask: bool = True
    rope_keys_v4: tuple[tuple[str, str], ...] = (
        ("rope_theta", "rope_theta"),
        ("partial_rotary_factor", "partial_rotary_factor"),
    )
    rope_scaling_keys_v4: tuple[str, ...] | None = None
    refused: tuple[tuple[str, object, str], ...] = ()

    @cached_property
    def config_class(self) -> type[PreTrainedConfig]:
        """The stock configuration class.

        Raises:
            ValueError: transformers knows no such `model_type`.
        """
        if self.model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`model_type` must be known to transformers, got {self.model_type!r}; register its configuration and "
                "models with AutoConfig and the other Auto classes first."
            )
        return CONFIG_MAPPING[self.model_type]

    def __str__(self) -> str:
        """The row as it would be written here: the fields that differ from their defaults."""
        given = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, FFNPaths):
                paths = ", ".join(f"{name}={path!r}" for name, path in value.given.items())
                given.append(f"paths=FFNPaths({paths})")
            elif value != field.default:
                given.append(f"{field.name}={value!r}")
        return f"Family({', '.join(given)})"

    def check(self, config: PreTrainedConfig) -> None:
        """Raises ValueError if a model of this family with this config can't be upcycled."""
        self.hf_activation(config)
        for field, required, reason in self.refused:
            value = getattr(config, field, required)
            if value != required:
                raise ValueError(
                    f"config.{field} must be {required!r} to upcycle a {self.model_type} model, got {value!r}: {reason}"
                )

    def hf_activation(self, config: PreTrainedConfig) -> str:
        """The kernels' name of the config's activation.

        Raises:
            ValueError: no kernel computes it.
        """
        name = getattr(config, self.activation)
        if name not in HF_ACTIVATIONS:
            raise ValueError(
                f"config.{self.activation} must be one of {', '.join(HF_ACTIVATIONS)} to upcycle, got {name!r}; "
                "an FFN with another activation can't be upcycled."
            )
        return HF_ACTIVATIONS[name]

    def layer_list(self, backbone: nn.Module) -> nn.ModuleList:
        """The backbone's layers."""
        return backbone.get_submodule(self.layers)

    def dense_ffn(self, layer: nn.Module, config: PreTrainedConfig) -> DenseFFN:
        """The dense FFN of a stock layer."""
        return self.paths.read(layer, self.hf_activation(config))


_GATED = FFNPaths(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_NEOX = FFNPaths(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
_CONV = {"paths": FFNPaths(up="mlp.c_fc", down="mlp.c_proj"), "site": "mlp.c_proj", "bypass": ("mlp.c_fc", "mlp.act")}
_UNCHUNKED = (
    "chunk_size_feed_forward",
    0,
    "the token mask covers the whole sequence, and routing all tokens at once makes chunks pointless.",
)
_BERT = {
    "paths": FFNPaths(up="intermediate.dense", down="output.dense"),
    "layers": "encoder.layer",
    "site": "output.dense",
    "bypass": ("intermediate",),
    "rope_keys_v4": (),
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", _GATED),
        Family("mistral", _GATED),
        Family("qwen2", _GATED),
        Family("qwen3", _GATED),
        Family("gemma", _GATED),
        Family("gemma2", _GATED, activation="hidden_activation"),
        Family(
            "gemma3_text",
            _GATED,
            activation="hidden_activation",
            rope_keys_v4=(
                ("rope_theta", "full_attention.rope_theta"),
                ("rope_local_base_freq", "sliding_attention.rope_theta"),
            ),
        ),
        Family("olmo2", _GATED, rope_scaling_keys_v4=("type", "factor")),
        Family("granite", _GATED),
        Family("stablelm", _GATED),
        Family(
            "phi3",
            FFNPaths(gate="mlp.gate_up_proj[0]", up="mlp.gate_up_proj[1]", down="mlp.down_proj"),
            rope_scaling_keys_v4=("type", "short_factor", "long_factor"),
        ),
        Family("phi", FFNPaths(up="mlp.fc1", down="mlp.fc2")),
        Family(
            "gpt_neox",
            _NEOX,
            rope_keys_v4=(("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor")),
        ),
        Family("falcon", _NEOX, layers="h", activation="activation", passes_mask=False),
        Family("starcoder2", **_CONV),
        Family("gpt2", **_CONV, layers="h", activation="activation_function", rope_keys_v4=()),
        Family(
            "opt",
            FFNPaths(up="fc1", down="fc2"),
            layers="decoder.layers",
            site="fc2",
            bypass=("fc1", "activation_fn"),
            activation="activation_function",
            masked="decoder",
            rope_keys_v4=(),
            refused=(("layerdrop", 0.0, "a skipped layer has no routing statistics for the auxiliary losses."),),
        ),
        Family("bert", **_BERT, refused=(_UNCHUNKED,)),
        Family("roberta", **_BERT, refused=(_UNCHUNKED,)),
        Family("deberta-v2", **_BERT, passes_mask=False),
        Family(
            "modernbert",
            FFNPaths(gate="mlp.Wi[0]", up="mlp.Wi[1]", down="mlp.Wo"),
            activation="hidden_activation",
            rope_keys_v4=(
                ("global_rope_theta", "full_attention.rope_theta"),
                ("local_rope_theta", "sliding_attention.rope_theta"),
            ),
            rope_scaling_keys_v4=(),
            refused=(("mlp_dropout", 0.0, "it lies between the activation and the down projection of every expert."),),
        ),
    )
}
