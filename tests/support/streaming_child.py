"""A process that runs commands in children of its own, each watched or killed (see test_streaming.py).

It runs them on a tiny model first, so that what a child takes beyond that is the checkpoint's memory, not that of
imports.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time

import torch
import transformers.utils.logging
from tiny_models import tiny_model

from ummrm.cli import main


def anonymous():
    """Bytes of memory that no file backs, of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) << 10


def watched(function, *arguments, **named):
    """What a function returns, and how much anonymous memory it took at most beyond what was there before."""
    before, most, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function(*arguments, **named)
    finally:
        done.set()
        watcher.join()
    return result, most


def run(arguments):
    """Runs a command; its exit status, and how much anonymous memory it took at most."""
    sys.argv = ["ummrm", *arguments]

    def command():
        try:
            main()
        except SystemExit as exit:
            return exit.code or 0
        return 0

    return watched(command)


def serve():
    """Forks a child for each request on stdin (JSON): `arguments`, and `seconds` after which it is killed, or None.

    Answers with its exit status (-9: killed), the anonymous memory it took at most, and the seconds it ran.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # it has a thread, whose locks a child would wait for
    answers = os.dup(1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as root:
        tiny_model("llama").save_pretrained(f"{root}/dense")
        for arguments in (("upcycle", f"{root}/dense", f"{root}/moe"), ("merge", f"{root}/moe", f"{root}/merged")):
            assert run(arguments)[0] == 0
    os.dup2(answers, 1)
    assert threading.active_count() == 1
    print("READY", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        receiver, sender = os.pipe()
        start, child = time.monotonic(), os.fork()
        if child == 0:
            os.dup2(2, 1)
            status, most = run(request["arguments"])
            os.write(sender, json.dumps(most).encode())
            os._exit(status)
        os.close(sender)
        timer = threading.Timer(request["seconds"] or 3600, os.kill, (child, signal.SIGKILL))
        timer.start()
        _, status = os.waitpid(child, 0)
        timer.cancel()
        timer.join()
        most = json.loads(os.read(receiver, 100) or b"0")
        os.close(receiver)
        answer = {"status": os.waitstatus_to_exitcode(status), "most": most, "seconds": time.monotonic() - start}
        print("RESULT", json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
