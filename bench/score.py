"""Scoring on a CPU: the merged model beside the dense one of its shapes, and `ummrm score` beside the best plain loop.

    python -m bench.score [--threads n] [--quick] [--turns n] [--output file]

The models are of one class and shape, so that equal times are what merging promises. The loop does what the command
does on the same file (reads it, makes tokens, writes lines of JSON), with all texts sorted by length beforehand and a
batch at a time through the model; the command has only a window of them in memory. What it takes to start is left out:
its time is what it says of itself, from the file's first line to the last reward. `bench.page` shows the record as
`cells`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import ummrm
from ummrm.memory import keep_freed_memory

from . import program, step
from .harness import about

BATCH = 16
# of the merged model: hidden, intermediate, layers, pairs of the batch, longest row
WHOLE = {False: (512, 1408, 4, 8, 256), True: (512, 1408, 4, 4, 128)}
# hidden size of the model that scores texts, rows of the file, turns: a command takes seconds to start
TEXTS = {False: (64, 8192, 9), True: (64, 4096, 4)}


def merged_and_dense(hidden, intermediate, layers):
    """The dense model, and what is merged of its mixture after its experts have moved apart."""
    torch.manual_seed(0)
    dense = LlamaForSequenceClassification(step.config(LlamaConfig, hidden, intermediate, layers))
    moe = ummrm.upcycle(dense, step.MIXTURES["token 7, 5, 1"], copy=True)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if "expert" in name:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    merged = ummrm.merge(ummrm.prepare_merge(moe))
    assert type(merged) is type(dense)
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    return {"dense": dense.eval(), "merged": merged.eval()}


def forward_of(model, batch):
    def call():
        begin = time.perf_counter()
        with torch.no_grad():
            model(**batch)
        return (time.perf_counter() - begin,)

    return call


def merged_entries(sizes, turns):
    hidden, intermediate, layers, pairs, longest = sizes
    batch = step.batch_of(pairs, longest)
    calls = {n: forward_of(model, batch) for n, model in merged_and_dense(hidden, intermediate, layers).items()}
    found = program.rounds(calls, turns)
    dense = program.best(found["dense"])[0]
    rows, width = batch["input_ids"].shape
    for label, of in found.items():
        seconds, noise = program.best(of)[0], program.noise(of)
        cells = {
            "model": label,
            "forward, ms": f"{1e3 * seconds:.1f}",
            "over dense": f"{seconds / dense:.3f}",
            "noise, %": f"{100 * noise:.1f}",
        }
        where = {"h": hidden, "i": intermediate, "layers": layers, "rows": rows, "width": width}
        entry = {"suite": "merged_forward", "label": label, "sizes": where, "seconds": seconds, "noise": noise}
        yield entry | {"cells": cells, "outcome": "measured"}


WORDS = [f"w{i}" for i in range(200)]


def save_model(folder, hidden):
    """A reward model with a tokenizer of words, the smallest that commands load."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    shapes = step.config(LlamaConfig, hidden, 2 * hidden, 2, max_position_embeddings=512)
    LlamaForSequenceClassification(shapes).save_pretrained(folder)


def write_texts(path, rows, seed):
    """Lines of words, of lengths as in `step.batch_of`."""
    lengths = step.batch_of(rows // 2, 160, seed)["attention_mask"].sum(1).tolist()
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    path.write_text("".join(json.dumps({"text": " ".join(WORDS[i] for i in text)}) + "\n" for text in drawn))


def command(folder, file, out, threads):
    """Seconds of `ummrm score` by its own clock, and of its start."""
    how = [sys.executable, "-m", "ummrm", "score", str(folder), str(file), "--batch-size", str(BATCH)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    with out.open("w") as stream:
        done = subprocess.run(how, stdout=stream, stderr=subprocess.PIPE, env=environment, check=True, text=True)
    seconds = float(re.search(r"texts in (\S+) s", done.stderr)[1])
    return seconds, time.perf_counter() - begin - seconds


def loop(model, tokenizer, file, out):
    """Seconds of the plain loop, from the file to the lines of JSON; the model is loaded."""
    begin = time.perf_counter()
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    ids = tokenizer(texts)["input_ids"]
    rewards = [0.0] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with torch.no_grad():
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            for i, reward in zip(rows, model(**batch).logits.squeeze(-1).tolist(), strict=True):
                rewards[i] = reward
    lines = (json.dumps({"line": i + 1, "reward": reward}) for i, reward in enumerate(rewards))
    out.write_text("".join(line + "\n" for line in lines))
    return time.perf_counter() - begin


def rewards_of(out):
    return torch.tensor([json.loads(line)["reward"] for line in out.read_text().splitlines()])


def score_entries(sizes, threads, turns):
    hidden, count, _ = sizes
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save_model(root / "model", hidden)
        write_texts(root / "texts.jsonl", count, 1)
        model = AutoModelForSequenceClassification.from_pretrained(root / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(root / "model")
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # said once, and it is the loop's way
        outs = {by: root / f"{by}.out" for by in ("command", "loop")}
        calls = {
            "ummrm score": lambda: command(root / "model", root / "texts.jsonl", outs["command"], threads),
            "plain loop": lambda: (loop(model, tokenizer, root / "texts.jsonl", outs["loop"]),),
        }
        for call in calls.values():
            call()
        torch.testing.assert_close(rewards_of(outs["command"]), rewards_of(outs["loop"]), rtol=1e-4, atol=1e-5)
        found = program.rounds(calls, turns, warm=True)
    best = {label: program.best(of) for label, of in found.items()}
    for label, of in found.items():
        noise = program.noise([parts[:1] for parts in of])
        cells = {
            "by": label,
            "rows a second": f"{count / best[label][0]:.0f}",
            "over the loop": f"{best['plain loop'][0] / best[label][0]:.2f}",
            "noise, %": f"{100 * noise:.0f}",
            "to start, s": f"{best[label][1]:.1f}" if len(best[label]) > 1 else "",
        }
        where = {"h": hidden, "layers": 2, "rows": count, "batch": BATCH}
        entry = {"suite": "score", "label": label, "sizes": where, "seconds": best[label], "noise": noise}
        yield entry | {"cells": cells, "outcome": "measured"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does
    made, sizes = about(torch.device("cpu")), TEXTS[options.quick]
    turns = options.turns or sizes[-1]
    entries = [*merged_entries(WHOLE[options.quick], 15), *score_entries(sizes, options.threads, turns)]
    program.write("score", {"about": made, "entries": entries}, options.threads, options.output)


if __name__ == "__main__":
    main()
