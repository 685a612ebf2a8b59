"""A study on checkpoints and data in little: folders that tests save themselves, in place of hub names."""

import copy
import json

import torch
from tiny_models import tiny_model
from tiny_study import _STUDY
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from trl_inputs import make_tokenizer, words

from lab import StudyConfig

_TASK = {
    "kind": "checkpoints",
    "template": "w1 {prompt} w2",
    "train_pairs": 16,
    "test_pairs": 8,
    "label_noise": 0.25,
    "policy_prompts": 6,
    "selection_prompts": 3,
    "samples": 8,
    "max_prompt_tokens": 8,
    "max_answer_tokens": 6,
}
_ONLINE = {
    "steps": 2,
    "batch_size": 8,
    "generations": 4,
    "forward_batch_size": 4,
    "learning_rate": 3e-3,
    "measure_every": 1,
    "measure_samples": 8,
}


def save_checkpoints(root, families=("gpt_neox", "llama"), tokenizer=None, **sizes):
    """Folders with tokenizers: a policy of the first family, from which reward models start too, and a gold model."""
    torch.manual_seed(0)
    policy, gold = families
    made = {
        "policy": tiny_model(policy, "ForCausalLM", **sizes),
        "gold": tiny_model(gold, "ForSequenceClassification", **sizes),
        "two_heads": tiny_model(gold, "ForSequenceClassification", num_labels=2, **sizes),
    }
    with torch.no_grad():  # so that answers end at different lengths
        made["policy"].get_output_embeddings().weight[2].mul_(10)
    for name, model in made.items():
        model.save_pretrained(root / name)
        (tokenizer or make_tokenizer()).save_pretrained(root / name)


def byte_tokenizer():
    """A token a byte, built as Qwen's and Llama 3's tokenizers are; of 259 tokens."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token=None
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}"
    return tokenizer


def save_data(root):
    """prompts.json, some prompts twice and some too long, and pairs.json, some answers as messages."""
    generator = torch.Generator().manual_seed(1)
    prompts = [{"instruction": words(1 + i % 3, generator), "input": "w9" if i % 4 == 0 else ""} for i in range(60)]
    prompts += [prompts[0], {"instruction": words(20, generator), "input": ""}]
    (root / "prompts.json").write_text(json.dumps(prompts))
    pairs = [{"prompt": words(2, generator), **{k: words(1 + i % 4, generator) for k in ANSWERS}} for i in range(40)]
    (root / "pairs.json").write_text(json.dumps(pairs))


ANSWERS = ("chosen", "rejected")


def data_on(root, task=None, **changes):
    """The plain data of the study."""
    data = copy.deepcopy(_STUDY)
    del data["policy"]
    names = {
        "policy": str(root / "policy"),
        "gold": {"name": str(root / "gold")},
        "prompts": {"name": "json", "data_files": str(root / "prompts.json"), "input_column": "input"},
    }
    data["regimes"] = {"alpaca": {"title": "checkpoints", "task": {**_TASK, **names, **(task or {})}}}
    data["model"] = {"folder": str(root / "policy")}
    data["arms"] = {
        "dense": {"kind": "dense", "ppo": True, "rloo": True, "grpo": True},
        "dense_longer": {"kind": "dense_longer"},
        "moe": {"kind": "moe"},
        "merged": {"kind": "merged", "ppo": True, "rloo": True},
    }
    data["rloo"] = data["grpo"] = _ONLINE
    data["secondary"] = [{"optimiser": "rloo", "outcome": "gold_end", "against": "dense"}]
    return {**data, **changes}


def study_on(root, task=None, **changes):
    """The study."""
    return StudyConfig.from_dict(data_on(root, task, **changes))


def pairs_of(root):
    """The preference data set as a field of the task."""
    return {"name": "json", "data_files": str(root / "pairs.json")}
