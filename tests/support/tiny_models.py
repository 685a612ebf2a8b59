"""Tiny stock models of every family and task, with biases and norms off their defaults, and padded batches."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from ummrm.hf.families import FAMILIES
from ummrm.hf.registry import stock_classes

VOCABULARY = 61
LAYERS = 2
MODEL_TYPES = list(FAMILIES)  # the rows of families.py, without what a test registers later
# Families whose kind of row the fast tier has in another one; they go through the same tests in the full tier.
ALIKE = {
    *("xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
    *("roformer", "mpnet", "deberta", "convbert", "big_bird", "mpt", "ctrl", "seed_oss", "xglm"),
}


def in_tier(model_type, *more, fast=True, **named):
    """A test's parameters, in the full tier where `fast` is false or another family stands for this one."""
    marks = () if fast and model_type not in ALIKE else pytest.mark.full
    return pytest.param(model_type, *more, marks=marks, **named)


EACH_TYPE = [in_tier(model_type) for model_type in MODEL_TYPES]


# What a family needs beside the common sizes: other names for them, and its own particulars switched on.
PARTICULARS = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {"mlp_bias": True, "residual_multiplier": 0.7, "embedding_multiplier": 3.0, "logits_scaling": 0.5},
    "stablelm": {"num_attention_heads": 3, "num_key_value_heads": 3, "use_parallel_residual": True},
    "phi": {"num_attention_heads": 3},
    "falcon": {"ffn_hidden_size": 44, "bias": True},
    "gpt2": {"n_inner": 44},
    "opt": {"ffn_dim": 44, "init_std": 0.2},
    "starcoder2": {"num_key_value_heads": 2, "residual_dropout": 0.1},
    "roberta": {"max_position_embeddings": 80},  # its positions start after the padding index
    "xlm-roberta": {"max_position_embeddings": 80},
    "xlm-roberta-xl": {"max_position_embeddings": 80},
    "camembert": {"max_position_embeddings": 80},
    "data2vec-text": {"max_position_embeddings": 80},
    "mpnet": {"max_position_embeddings": 80},
    "electra": {"embedding_size": 20},
    "ernie": {"use_task_id": True},
    "rembert": {"input_embedding_size": 20, "output_embedding_size": 20},
    "roformer": {"embedding_size": 20},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "convbert": {"embedding_size": 20, "head_ratio": 2, "conv_kernel_size": 3},
    "big_bird": {"attention_type": "original_full", "sep_token_id": 2},
    "xglm": {"ffn_dim": 44, "num_layers": LAYERS, "init_std": 0.2},
    "lfm2": {
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "ctrl": {"dff": 44},
    "openai-gpt": {"initializer_range": 0.4},  # its norms after the FFN leave little of what differs
    "seed_oss": {"num_key_value_heads": 2, "head_dim": 8, "mlp_bias": True, "residual_dropout": 0.0},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "modernbert": {
        "mlp_bias": True,
        "local_attention": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}


def tiny_config(model_type, **overrides):
    """A two-layer configuration whose sizes divide nothing in particular."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 1,
        "initializer_range": 0.2,  # 0.02 would leave logits so small that any comparison passes
    }
    return CONFIG_MAPPING[model_type](**{**sizes, **PARTICULARS.get(model_type, {}), **overrides})


def reward_class(model_type):
    """The stock class that reward models of a family have; a causal LM where transformers has none (granite)."""
    names = {c.__name__: c for c in stock_classes(FAMILIES[model_type])}
    return next(c for task in ("ForSequenceClassification", "ForCausalLM") for n, c in names.items() if task in n)


def tiny_model(model_type, task=None, dtype=torch.float32, **overrides):
    """A random stock model in eval mode; `task` is a class-name ending, by default the reward model's."""
    classes = {c.__name__: c for c in stock_classes(FAMILIES[model_type])}
    stock = next(c for n, c in classes.items() if n.endswith(task)) if task else reward_class(model_type)
    model = stock(tiny_config(model_type, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start at 0 and 1: make a lost one visible
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().to(dtype)


def padded_batch(model=None, side="right", lengths=(9, 4, 1)):
    """input_ids and attention_mask of unequal lengths, padded on one side (both for `side="both"`)."""
    longest = max(lengths) + (1 if side == "both" else 0)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = {"right": 0, "left": longest - length, "both": 1 if length < longest else 0}[side]
        ids[row, start : start + length] = torch.randint(3, VOCABULARY, (length,))
        mask[row, start : start + length] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if model is not None and "MultipleChoice" in type(model).__name__:
        batch = {k: torch.stack([v, v.flip(0)], dim=1) for k, v in batch.items()}
    return batch


def outputs_of(model, batch):
    """Every float tensor of a model's output at live positions, flattened into one vector."""
    out = model(**batch)
    mask = batch["attention_mask"].bool()
    parts = []
    for value in out.to_tuple():
        if torch.is_tensor(value) and value.is_floating_point():
            per_token = value.shape[: mask.dim()] == mask.shape
            parts.append((value[mask] if per_token else value).flatten())
    return torch.cat(parts)


def perturb_experts(model, scale=0.3):
    """Makes the experts of an upcycled model distinct: at upcycling all are equal and the router has no gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name or ".expert_" in name:
                parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
    return model
