"""One process of trainings under an engine for several: DDP, accelerate's FSDP2, or DeepSpeed's ZeRO.

`run` is what every process does, and one process alone too, so that both can be compared. Started by torchrun with the
engine and a JSON list of the arguments of trainings, which it runs one after the other.
"""

import contextlib
import copy
import faulthandler
import json
import os
import signal
import sys

import torch
from accelerate.state import AcceleratorState
from fsdp_on_cpu import shard_on_cpu
from tiny_models import tiny_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import RewardConfig
from trl_inputs import CONFIG, SEQUENCE, make_dataset, make_moe, make_tokenizer, settings

import ummrm
from ummrm import (
    MergeConfig,
    UmmDistillConfig,
    UmmDistillTrainer,
    UmmMergeConfig,
    UmmMergeTrainer,
    UmmRewardTrainer,
    UpcycleConfig,
)
from ummrm.hf import ensembles
from ummrm.hf.sharding import is_sharded, reshard, unpartitioned

PAIRS = 16
# z-loss alone: accumulated, the balancing loss is the mean of the batches' own, by its definition
Z_LOSS = UpcycleConfig(**{**CONFIG.to_dict(), "balancing_loss_coef": 0.0, "z_loss_coef": 1.0})
LINEAR = UpcycleConfig(assignment="sequence", experts_in="all")
UPCYCLE = {"token": CONFIG, "accumulated": Z_LOSS, "sequence": SEQUENCE, "all": LINEAR}


def zero(stage):
    """DeepSpeed's configuration; a threshold of 0 partitions the smallest parameter, which a tiny model needs."""
    sharing = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": sharing, "zero_allow_untested_optimizer": True, **dict.fromkeys(automatic, "auto")}


def settings_of(engine, universal=False):
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    if not engine.startswith("zero"):
        return {"ddp_backend": "gloo"}
    return {"deepspeed": zero(int(engine[-1])) | ({"checkpoint": {"load_universal": True}} if universal else {})}


class Killed(TrainerCallback):
    """Ends one process at a step, as the system does where memory runs out: no exception, no word to the others."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_step_begin(self, args, state, control, **kwargs):
        if (args.process_index, state.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    out,
    engine="",
    *,
    phase="mixture",
    config="token",
    model_type="llama",
    load=False,
    merge=None,
    kill=None,
    universal=False,
    **arguments,
):
    """Trains; leaves the log, the model in a folder and, of the merge phase, the merged model.

    Args:
        out: a folder.
        engine: `ddp`, `fsdp2`, `zero2` or `zero3`; none in one process.
        phase: `mixture`, `merge`, or `distill`: of a mixture by its path and a model in memory.
        config: of `UPCYCLE`.
        model_type: a family.
        load: hand the trainer a path, not a model.
        merge: fields of MergeConfig.
        kill: a rank and a step: that process is killed there.
        universal: resume from a checkpoint of DeepSpeed's that has been made universal.
        arguments: of the trainer; `global_batch` is the number of pairs a step, over processes and micro-batches.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    pairs = arguments.pop("global_batch", 8) // processes // arguments.get("gradient_accumulation_steps", 1)
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "max_steps": 2}
    plain |= settings_of(engine, universal) if engine else {}
    kind = {"merge": UmmMergeConfig, "distill": UmmDistillConfig}.get(phase, RewardConfig)
    args = settings(f"{out}/trainer", kind, **{**plain, "per_device_train_batch_size": pairs, **arguments})
    with unpartitioned():
        moe = make_moe(config=UPCYCLE[config], model_type=model_type)
    if load:
        with args.main_process_first():
            if args.process_index == 0:
                moe.save_pretrained(f"{out}/start")
        moe = f"{out}/start"
    if phase == "distill":
        moe, teacher = make_student(moe, f"{out}/teacher", args)
    data = {"train_dataset": make_dataset(PAIRS, longest=30), "eval_dataset": make_dataset(7, 1)}
    if phase == "merge":
        trainer = UmmMergeTrainer(
            moe, args, processing_class=make_tokenizer(), merge_config=MergeConfig(**merge or {}), **data
        )
    elif phase == "distill":
        with watched_scores() as held:
            trainer = UmmDistillTrainer(moe, args, processing_class=make_tokenizer(), teacher=teacher, **data)
        # by its path, then that in memory, of two sets; ZeRO-2 shares no weights
        assert held == [engine in ("fsdp2", "zero3"), False] * 2, held
    else:
        trainer = UmmRewardTrainer(moe, args, processing_class=make_tokenizer(), **data)
    if kill is not None:
        trainer.add_callback(Killed(*kill))
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    log = [*trainer.state.log_history, trainer.evaluate()]
    check_sharding(engine, trainer)
    trainer.save_model(f"{out}/model")
    if phase == "merge":
        trainer.save_merged(f"{out}/merged")
    if trainer.is_world_process_zero():
        torch.save(log, f"{out}/log.pt")
    return log


def make_student(moe, folder, args):
    """A mixture's merged model, and as teachers the mixture by its path and another dense one."""
    with unpartitioned():
        teacher = [folder, tiny_model("llama")]
        student = ummrm.merge(
            ummrm.prepare_merge(copy.deepcopy(moe)) if moe.config.umm["assignment"] == "token" else moe
        )
    with args.main_process_first():
        if args.process_index == 0:
            ummrm.save_pretrained(moe, folder)
            make_tokenizer().save_pretrained(folder)
    return student, teacher


@contextlib.contextmanager
def watched_scores():
    """Whether processes shared each teacher's weights while it scored."""
    score, seen = ensembles.score_texts, []

    def watched(model, *args, **kwargs):
        seen.append(is_sharded(model))
        return score(model, *args, **kwargs)

    ensembles.score_texts = watched
    try:
        yield seen
    finally:
        ensembles.score_texts = score


def check_sharding(engine, trainer):
    """Each engine does what it is here for."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if engine == "fsdp2":
        reshard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        ranks = torch.distributed.get_world_size()
        for name, stack in model.named_parameters():  # of experts no process holds more than another, of one alone too
            if "experts." in name or "expert_weight" in name:
                assert stack.to_local().numel() * ranks == stack.numel(), name
    if engine == "zero3":
        held = [(p.ds_tensor.numel(), p.ds_numel) for p in model.parameters()]
        assert all(own < whole or whole == 1 for own, whole in held), held


if __name__ == "__main__":
    faulthandler.dump_traceback_later(1200, exit=True)  # where it hangs, and no waiting for it
    torch.set_num_threads(1)
    shard_on_cpu()
    for case in json.loads(sys.argv[2]):
        run(engine=sys.argv[1], **case)
        AcceleratorState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
