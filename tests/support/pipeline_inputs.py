"""A tiny backbone, preference pairs in a file, and a recipe of them."""

import json
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl_inputs import make_tokenizer

WORDS = 40


def write_backbone(folder, seed=0):
    """A causal language model with its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path, count=40, seed=0, broken=()):
    """Pairs whose better answer has words of lower number; lines of `broken` come behind them."""
    draw = random.Random(seed)

    def text(low, high, length):
        return " ".join(f"w{draw.randrange(low, high)}" for _ in range(length))

    rows = [
        {"prompt": text(0, 20, 3), "chosen": " " + text(0, 8, draw.randint(1, 4)), "rejected": " " + text(12, 20, 3)}
        for _ in range(count)
    ]
    path.write_text("\n".join([*map(json.dumps, rows), *broken]) + "\n")
    return path


def recipe_of(folder, **changes):
    """A recipe of a tiny run as plain data."""
    return {
        "model": str(folder / "backbone"),
        "data": {"train": str(folder / "pairs.jsonl"), "held_out_share": 0.2},
        "output": str(folder / "out"),
        "training": {"per_device_train_batch_size": 8, "learning_rate": 2e-3, "save_steps": 1},
        **changes,
    }
