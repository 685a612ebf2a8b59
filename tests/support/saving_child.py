"""A process that saves models in children that die by SIGKILL at the n-th system operation (see test_saving.py)."""

import functools
import json
import os
import signal
import sys
import tempfile
import threading

import torch
import transformers.configuration_utils
import transformers.modeling_utils
import transformers.utils.logging
from tiny_models import tiny_model

import ummrm

CONFIG = ummrm.UpcycleConfig(num_experts=3, num_experts_per_tok=2)
STEPS = (
    *((os, name) for name in ("write", "rename", "fsync", "mkdir", "unlink", "rmdir")),
    (transformers.modeling_utils, "safe_save_file"),
    (transformers.configuration_utils.PreTrainedConfig, "to_json_file"),
)


def make_model(seed, merged):
    torch.manual_seed(seed)
    model = ummrm.upcycle(tiny_model("llama"), CONFIG)
    return ummrm.merge(ummrm.prepare_merge(model)) if merged else model


@functools.cache
def kept_model(seed, merged):
    model = make_model(seed, merged)
    with tempfile.TemporaryDirectory() as folder:  # what only the first save needs, or every child does it anew
        ummrm.save_pretrained(model, folder)
    return model


def save_and_die(model, folder, die_at, shards):
    """Saves, killed at the `die_at`-th step of the save (0: never); the number of steps if it lives."""
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

    if die_at:
        for owner, name in STEPS:
            watch(owner, name)
    else:  # somebody attaches a tracer first
        os.kill(os.getpid(), signal.SIGSTOP)
    ummrm.save_pretrained(model, folder, max_shard_size=shards)
    return steps


def serve():
    """Forks one child for each request on stdin (JSON), so that imports and models are paid once.

    Answers with the child's process where it waits for a tracer; then with its number of steps, "killed" or "failed".
    Nothing here starts a thread before the fork.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # it has a thread, whose locks a child would wait for
    for line in sys.stdin:
        request = json.loads(line)
        model = kept_model(request.pop("seed"), request.pop("merged"))
        assert threading.active_count() == 1
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(sender, str(save_and_die(model, **request)).encode())
            os._exit(0)
        os.close(sender)
        if not request["die_at"]:
            os.waitpid(child, os.WUNTRACED)
            print("STOPPED", child, flush=True)
        _, status = os.waitpid(child, 0)
        answer = os.read(receiver, 100).decode()
        os.close(receiver)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("RESULT", "killed" if killed else answer or "failed", flush=True)


if __name__ == "__main__":
    serve()
