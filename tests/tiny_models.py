"""Tiny stock models of every family and task, with biases and norms off their defaults, and padded batches."""

import torch
from transformers import CONFIG_MAPPING

from ummrm.families import FAMILIES
from ummrm.modeling import stock_classes

VOCABULARY = 61
LAYERS = 2


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
    return CONFIG_MAPPING[model_type](**{**sizes, **overrides})


def tiny_model(model_type, task="ForSequenceClassification", dtype=torch.float32, **overrides):
    """A random stock model in eval mode; `task` is a class-name ending, or "" for the backbone."""
    classes = {c.__name__: c for c in stock_classes(FAMILIES[model_type])}
    name = next(n for n in classes if n.endswith(task or "Model"))
    model = classes[name](tiny_config(model_type, **overrides))
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
            if "experts." in name:
                parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
    return model
