"""One row for each Hugging Face family: where its layers are, and where a layer keeps its FFN.

A row is all that `modeling.py`, `upcycle.py` and `merge.py` know about an architecture. To add a family, add a row
here and one tiny config to the family test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .dense import DenseFFN, FFNPaths

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
        layers: path of the list of layers below the backbone.
        paths: the projections of a layer's dense FFN, below the layer.
        site: where the upcycled FFN stands, below the layer; what stands there is called with [..., H] and returns it.
        bypass: a submodule that becomes the identity, for an FFN that is no module of its own (BERT keeps its up
            projection and its down projection in two modules: the first is bypassed, the second holds the site).
        activation: the config field that names the activation.
        legacy_rope: pairs (config key that transformers 4 reads, key of transformers 5's `rope_parameters`), so that
            an exported model keeps its rotary base in tools that pin transformers 4.
        refused: config fields that must have a given value, with the reason; anything else is a clear error.
    """

    model_type: str
    layers: str
    paths: FFNPaths
    site: str
    bypass: str | None = None
    activation: str = "hidden_act"
    legacy_rope: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, object, str], ...] = ()

    @cached_property
    def config_class(self) -> type[PreTrainedConfig]:
        """The stock configuration class."""
        return CONFIG_MAPPING[self.model_type]

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


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            layers="layers",
            paths=FFNPaths(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
            site="mlp",
            legacy_rope=(("rope_theta", "rope_theta"),),
        ),
        Family(
            "gpt_neox",
            layers="layers",
            paths=FFNPaths(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
            site="mlp",
            legacy_rope=(("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor")),
        ),
        Family(
            "bert",
            layers="encoder.layer",
            paths=FFNPaths(up="intermediate.dense", down="output.dense"),
            site="output.dense",
            bypass="intermediate",
            refused=(
                (
                    "chunk_size_feed_forward",
                    0,
                    "the token mask covers the whole sequence, and routing all tokens at once makes chunks pointless.",
                ),
            ),
        ),
    )
}


def find_family(model_type: str) -> Family:
    """The row of a stock `model_type`.

    Raises:
        ValueError: no row; names the known ones and the remedy.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"no family for model_type {model_type!r}; ummrm knows {', '.join(sorted(FAMILIES))}. For another "
            "architecture add a row to ummrm/families.py, or replace its FFN modules yourself with "
            "UpcycledFFN.from_dense(ffn, config)."
        )
    return FAMILIES[model_type]
