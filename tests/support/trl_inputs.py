"""What the tests of training with TRL share: a tokenizer made offline, tiny preference pairs, models, and settings."""

import os

import datasets
import torch
from datasets import Dataset
from tiny_models import VOCABULARY, perturb_experts, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import RewardConfig

import ummrm
from ummrm import UpcycleConfig

os.environ.setdefault("CI", "1")  # TRL then reports no usage home
datasets.disable_progress_bars()

WORDS = [f"w{i}" for i in range(VOCABULARY - 6)]
CONFIG = UpcycleConfig(
    num_experts=4, num_experts_per_tok=2, router_init_std=0.5, z_loss_coef=0.1, balancing_loss_coef=0.1
)
SEQUENCE = UpcycleConfig(assignment="sequence")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer():
    """One token a word, with the special tokens that the tiny models' configurations name."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def words(count, generator):
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))


def make_pairs(count=16, seed=0, longest=9, equal=False):
    """(prompt, chosen, rejected) texts; all of one length if `equal`."""
    generator = torch.Generator().manual_seed(seed)

    def length():
        return longest if equal else int(torch.randint(1, longest + 1, (), generator=generator))

    rows = [tuple(words(n, generator) for n in (3, length(), length())) for _ in range(count)]
    return [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]


def make_dataset(count=16, seed=0, kind="implicit", **options):
    """Preference pairs in one of the formats that TRL takes."""
    pairs = make_pairs(count, seed, **options)
    if kind == "explicit":
        rows = [{**p, "chosen": " " + p["chosen"], "rejected": " " + p["rejected"]} for p in pairs]
    elif kind == "conversational":
        rows = [
            {"prompt": [message("user", p["prompt"])], **{k: [message("assistant", p[k])] for k in ANSWERS}}
            for p in pairs
        ]
    elif kind == "conversational implicit":
        rows = [{k: [message("user", p["prompt"]), message("assistant", p[k])] for k in ANSWERS} for p in pairs]
    elif kind == "tokenised":
        tokenizer = make_tokenizer()
        rows = [{f"{k}_ids": tokenizer(p["prompt"] + " " + p[k])["input_ids"] for k in ANSWERS} for p in pairs]
    else:
        rows = [{k: p["prompt"] + " " + p[k] for k in ANSWERS} for p in pairs]
        if kind == "margin":
            rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(rows)]
    return Dataset.from_list(rows)


ANSWERS = ("chosen", "rejected")


def message(role, content):
    return {"role": role, "content": content}


def make_moe(seed=0, config=CONFIG, model_type="llama"):
    torch.manual_seed(seed)
    return perturb_experts(ummrm.upcycle(tiny_model(model_type), config))


def settings(folder, kind=RewardConfig, **overrides):
    """Plain fp32 training on the CPU, without what a tiny run has no use for; overridden at will."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "dataloader_pin_memory": False,
    }
    return kind(str(folder), **{**defaults, **overrides})
