"""A whole training step of a reward model on a CPU: forward with the loss, backward, optimiser, and its memory.

    python -m bench.step [--hidden 512] [--threads n] [--quick] [--turns n] [--output file]

The dense model, its mixtures, the merge phase, and transformers' own mixture with as many experts in all and as many
active ones as `token 8, 2, 1` has; all on one batch of pairs in fp32, in rounds side by side. AdamW is timed in its
three forms on the same gradients; a step's sum has the fused one. `bench.page` shows the record as `cells step`.
"""

import argparse
import time
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, MixtralConfig, MixtralForSequenceClassification

import ummrm
from ummrm.memory import keep_freed_memory

from . import program, timing
from .harness import about

# layers, intermediate size
SHAPES = {512: (4, 1408), 1024: (2, 2816)}
VOCABULARY = 1024
PADDING = 0
# pairs of a batch, tokens that the longest row may have at the smallest hidden size, turns
SIZES = {False: (8, 384, 9), True: (4, 160, 3)}
MIXTURES = {
    "token 7, 5, 1": ummrm.UpcycleConfig(num_experts=7, num_experts_per_tok=5, num_shared_experts=1),
    "token 8, 2, 1": ummrm.UpcycleConfig(num_experts=8, num_experts_per_tok=2, num_shared_experts=1),
    "sequence 4, 1, 0": ummrm.UpcycleConfig(
        assignment="sequence", num_experts=4, num_experts_per_tok=1, num_shared_experts=0
    ),
}
MERGED = "merge phase of token 7, 5, 1"
MIXTRAL = ("eager", "grouped_mm")
ACTIVE = {"dense": 1, "token 7, 5, 1": 6, "token 8, 2, 1": 3, "sequence 4, 1, 0": 1, MERGED: 1}
ADAMW = {"fused": (True, None), "foreach": (None, True), "default": (None, None)}  # flags fused and foreach


def batch_of(pairs, longest, seed=0):
    """input_ids and attention_mask of chosen rows, then rejected ones, right-padded to the longest row.

    Lengths are log-normal, as answers' are: most near the median of a third of `longest`, a few several times as long.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = (longest / 3) * torch.randn(2 * pairs, generator=generator).mul(0.6).exp()
    lengths = drawn.round().long().clamp(4, longest)
    ids = torch.randint(1, VOCABULARY, (2 * pairs, int(lengths.max())), generator=generator)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def config(kind, hidden, intermediate, layers, **more):
    return kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        num_key_value_heads=max(hidden // 64, 1),
        vocab_size=VOCABULARY,
        pad_token_id=PADDING,
        num_labels=1,
        **more,
    )


def models(hidden, intermediate, layers):
    """What is trained, by label. transformers' mixture has one model for its two ways, of 9 experts and 3 active."""
    torch.manual_seed(0)
    dense = LlamaForSequenceClassification(config(LlamaConfig, hidden, intermediate, layers))
    made = {"dense": dense}
    made |= {label: ummrm.upcycle(dense, how, copy=True) for label, how in MIXTURES.items()}
    made[MERGED] = ummrm.prepare_merge(ummrm.upcycle(dense, MIXTURES["token 7, 5, 1"], copy=True))
    sizes = {"num_local_experts": 9, "num_experts_per_tok": 3}
    mixtral = MixtralForSequenceClassification(config(MixtralConfig, hidden, intermediate, layers, **sizes))
    made |= {f"Mixtral 9, 3, {way}": mixtral for way in MIXTRAL}
    return {label: model.train() for label, model in made.items()}


class Step:
    """One contender's step on one batch.

    Args:
        label: of the table; what ends with a name of `MIXTRAL` is run that way.
        model: in training mode.
        batch: of `batch_of`.
        optimizer: AdamW over what is trained; shared by contenders that share a model.
    """

    def __init__(self, label, model, batch, optimizer):
        self._model, self._batch, self._optimizer, self._label = model, dict(batch), optimizer, label
        self._way = next((way for way in MIXTRAL if label.endswith(way)), None)
        if label.startswith("sequence"):
            pairs = len(batch["input_ids"]) // 2
            groups = ummrm.draw_groups(pairs, MIXTURES[label].num_experts, seed=0, step=0)
            self._batch["groups"] = groups.repeat(2)
        self._has_router = label.startswith("token")

    def loss(self):
        if self._way is not None:
            self._model.set_experts_implementation(self._way)
        rewards = self._model(**self._batch).logits.squeeze(-1)
        loss = ummrm.preference_loss(*rewards.chunk(2))
        return loss + ummrm.auxiliary_loss(self._model) if self._has_router else loss

    def __call__(self):
        """Seconds of forward, backward, and AdamW fused, foreach and by default."""
        marks = [time.perf_counter()]
        loss = self.loss()
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        for fused, foreach in ADAMW.values():
            for group in self._optimizer.param_groups:
                group["fused"], group["foreach"] = fused, foreach
            self._optimizer.step()
            marks.append(time.perf_counter())
        self._optimizer.zero_grad()
        return tuple(end - begin for begin, end in zip(marks[:-1], marks[1:], strict=True))

    def memory(self):
        """Bytes of parameters, of their gradients, of AdamW's states, and of what forward keeps for backward."""
        parameters = list(self._model.parameters())
        trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        states = [v for state in self._optimizer.state.values() for v in state.values() if v.dim() > 0]
        kept = timing.saved_bytes(self.loss, [parameters, list(self._batch.values())])["held_bytes"]
        return {
            "parameters": timing.tensor_bytes(parameters),
            "gradients": trained,
            "states": timing.tensor_bytes(states),
            "activations": kept,
        }


def entry_of(label, seconds, noise, memory, dense, sizes):
    """An entry of the record; `dense` is the dense model's step in seconds."""
    forward, backward, fused, foreach, default = seconds
    step = forward + backward + fused
    mib = {name: count / 2**20 for name, count in memory.items()}
    cells = {
        "model": label,
        "active FFNs": str(ACTIVE.get(label, 3)),
        "step, ms": f"{1e3 * step:.0f}",
        "over dense": f"{step / dense:.2f}",
        "noise, %": f"{100 * noise:.0f}",
        "forward, ms": f"{1e3 * forward:.0f}",
        "backward, ms": f"{1e3 * backward:.0f}",
        "AdamW fused, ms": f"{1e3 * fused:.1f}",
        "foreach, ms": f"{1e3 * foreach:.1f}",
        "default, ms": f"{1e3 * default:.1f}",
        "weights, gradients, states, MiB": f"{mib['parameters'] + mib['gradients'] + mib['states']:.0f}",
        "kept for backward, MiB": f"{mib['activations']:.0f}",
    }
    times = dict(zip(("forward", "backward", *(f"adamw {n}" for n in ADAMW)), seconds, strict=True))
    return {"suite": "step", "label": label, "sizes": sizes, "seconds": times, "noise": noise, "bytes": memory} | {
        "cells": cells,
        "outcome": "measured",
    }


def measure(hidden, intermediate, layers, pairs, longest, turns):
    """The record's entries."""
    batch, made, optimizers, steps = batch_of(pairs, longest), models(hidden, intermediate, layers), {}, {}
    rows, width = batch["input_ids"].shape
    sizes = {"h": hidden, "i": intermediate, "layers": layers, "rows": rows, "width": width}
    sizes["live_tokens"] = int(batch["attention_mask"].sum())
    for label, model in made.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizers.setdefault(id(model), torch.optim.AdamW(trained, lr=1e-6))
        steps[label] = Step(label, model, batch, optimizer)
    check_equal(made, batch)
    found = program.rounds(steps, turns)
    best = {label: program.best(of) for label, of in found.items()}
    dense = sum(best["dense"][:3])
    entry = partial(entry_of, dense=dense, sizes=sizes)
    return [
        entry(label, best[label], program.noise([parts[:3] for parts in of]), steps[label].memory())
        for label, of in found.items()
    ]


def check_equal(made, batch):
    """Before anything is trained every mixture computes what the dense model does: nothing else is worth timing."""
    want = made["dense"](**batch).logits
    with torch.no_grad():
        for label, model in made.items():
            if label.startswith("Mixtral") or label == "dense":
                continue
            groups = {"groups": torch.zeros(len(want), dtype=torch.long)} if label.startswith("sequence") else {}
            got = model(**batch, **groups).logits
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, choices=SHAPES, default=512)
    program.arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as ummrm's commands do
    layers, intermediate = SHAPES[options.hidden]
    pairs, longest, turns = SIZES[options.quick]
    longest = longest * min(SHAPES) // options.hidden  # about as many operations at each size
    made = about(torch.device("cpu"))
    entries = measure(options.hidden, intermediate, layers, pairs, longest, options.turns or turns)
    program.write(f"step-{options.hidden}", {"about": made, "entries": entries}, options.threads, options.output)


if __name__ == "__main__":
    main()
