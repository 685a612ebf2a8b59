"""Runs a recipe in a process of its own: `pipeline_child.py RECIPE [seconds between steps]`."""

import sys
import time

import torch
from transformers import TrainerCallback

from ummrm.pipeline import read_recipe, run_recipe, stages


class _Slow(TrainerCallback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:  # so that a kill finds it at work
        make = stages.make_trainer

        def slow(*args, **kwargs):
            trainer = make(*args, **kwargs)
            trainer.add_callback(_Slow(float(sys.argv[2])))
            return trainer

        stages.make_trainer = slow
    run_recipe(read_recipe(sys.argv[1]), log=lambda line: print(line, flush=True))
