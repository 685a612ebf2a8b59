"""A tiny model that comes with code of its own, and a tokenizer that does: folders as one finds them on the hub."""

import contextlib
import json
import sys

from pipeline_inputs import write_backbone
from transformers import CONFIG_MAPPING, dynamic_module_utils
from transformers.models.auto import modeling_auto

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "{model_type}"
"""
MODELING = """
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from .configuration_own import OwnConfig


class OwnModel(LlamaModel):
    config_class = OwnConfig


class OwnForSequenceClassification(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = OwnModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        live = input_ids != self.config.pad_token_id
        last = (live * torch.arange(live.shape[1], device=live.device)).argmax(-1)
        logits = self.score(hidden)[torch.arange(len(hidden), device=hidden.device), last]
        return SequenceClassifierOutputWithPast(logits=logits)
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def write_own_model(folder, model_type, seed=0):
    """A reward model whose classes are in files beside its weights; `model_type` must be no other test's."""
    from safetensors.torch import load_file, save_file
    from torch import full

    write_backbone(folder, seed)
    weights = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "lm_head" not in name
    }
    weights["score.weight"] = full((1, 16), 0.5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink(missing_ok=True)
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    code["AutoModelForSequenceClassification"] = "modeling_own.OwnForSequenceClassification"
    config |= {"model_type": model_type, "architectures": ["OwnForSequenceClassification"], "auto_map": code}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(model_type=model_type))
    (folder / "modeling_own.py").write_text(MODELING)
    return folder


def write_own_tokenizer(folder):
    """Gives a model folder a tokenizer class of its own."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text(TOKENIZER)
    return folder


@contextlib.contextmanager
def modules_in(cache):
    """Lets transformers put code into a folder of the caller's; afterwards the process has forgotten it."""
    old, path = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path)
    dynamic_module_utils.HF_MODULES_CACHE = str(cache)
    try:
        yield cache
    finally:
        dynamic_module_utils.HF_MODULES_CACHE = old
        sys.path[:] = path
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]
        for auto in vars(modeling_auto).values():
            extra = getattr(getattr(auto, "_model_mapping", None), "_extra_content", {})
            for kind in [kind for kind in extra if kind.__name__ in ("OwnConfig", "UmmOwnConfig")]:
                del extra[kind]
        for name in [name for name in CONFIG_MAPPING._extra_content if "own_" in name]:
            del CONFIG_MAPPING._extra_content[name]
