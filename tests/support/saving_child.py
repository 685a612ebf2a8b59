"""A process that saves models in children that die by SIGKILL at the n-th system operation (see test_saving.py)."""

import json
import os
import signal
import sys

import torch
import transformers.configuration_utils
import transformers.modeling_utils
from tiny_models import tiny_model

import ummrm
from ummrm.hf import saving

CONFIG = ummrm.UpcycleConfig(num_experts=3, num_experts_per_tok=2)
STEPS = (
    (os, "rename"),
    (os, "fsync"),
    (os, "link"),
    (os, "makedirs"),
    (saving, "_put_in_place"),
    (saving, "_exchange"),
    (saving, "_flush_tree"),
    (saving, "_carry_over"),
    (saving.shutil, "rmtree"),
    (transformers.modeling_utils, "safe_save_file"),
    (transformers.configuration_utils.PreTrainedConfig, "to_json_file"),
)


def make_model(seed, merged):
    torch.manual_seed(seed)
    model = ummrm.upcycle(tiny_model("llama"), CONFIG)
    return ummrm.merge(ummrm.prepare_merge(model)) if merged else model


def save_and_die(folder, die_at, seed, merged, exchange):
    """Saves `make_model(seed, merged)`, killed at the `die_at`-th step of the save; the number of steps if it lives."""
    model = make_model(seed, merged)
    steps = 0

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    if not exchange:
        saving._exchange = lambda a, b: False
    for owner, name in STEPS:
        watch(owner, name)
    model.save_pretrained(folder, max_shard_size="20KB")
    return steps


def serve():
    """Forks one child for each request on stdin (JSON arguments of `save_and_die`), so that imports are paid once.

    Answers with the child's number of steps, or "killed", or "failed". Nothing here starts a thread before the fork.
    """
    torch.set_num_threads(1)
    for line in sys.stdin:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(sender, str(save_and_die(**json.loads(line))).encode())
            os._exit(0)
        os.close(sender)
        _, status = os.waitpid(child, 0)
        answer = os.read(receiver, 100).decode()
        os.close(receiver)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("RESULT", "killed" if killed else answer or "failed", flush=True)


if __name__ == "__main__":
    serve()
