"""Rated texts and models of a size for tests: an archive in the form of the registry's, and model folders."""

import io
import random
import tarfile

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"word{i}" for i in range(30)]


def rated_lines(texts, seed=0):
    """(ground truth, ratings): lines of both files for `texts` distinct texts whose rating follows from their words."""
    draws = random.Random(seed)
    truths, ratings = [], []
    for i in range(texts):
        words = draws.choices(WORDS, k=draws.randint(2, 9))
        mean = sum(WORDS.index(w) % 5 - 2 for w in words) / len(words)
        given = [max(-4, min(4, round(mean + draws.gauss(0, 1)))) for _ in range(12)]
        truths.append(f"{i}\t{sum(given) / 12}\t{' '.join(words)} {WORDS[i % 30]} {WORDS[i // 30]}")
        ratings.append(f"{i}\t{sum(given) / 12}\t1.0\t{given}")
    return truths, ratings


def write_archive(path, truths, ratings, stem="movieReviewSnippets"):
    """A source archive that carries the data's own, as the registry's does."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, lines in (("GroundTruth", truths), ("anonDataRatings", ratings)):
            _add(archive, f"hutto_ICWSM_2014/{stem}_{name}.txt", ("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        _add(archive, "package-1/setup.py", b"raise SystemExit('nobody runs me')")
        _add(archive, "package-1/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def save_model(folder, family="bert"):
    """A BERT or a Llama of three layers, without a head, with a tokenizer of whole words."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(special + WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    if family == "bert":
        model = BertModel(BertConfig(**sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0 and norms at 1, which would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def _add(archive, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
