"""UmmRewardTrainer and UmmMergeTrainer on a model that transformers' engine has sharded, or on the whole one: what one
step of plain gradient descent leaves, and what is logged and measured."""

import functools
import os

import torch
import torch.distributed as dist
from engine import full
from trl import RewardConfig
from trl_inputs import CONFIG, SEQUENCE, make_dataset, make_moe, make_tokenizer, settings

import ummrm
from ummrm import MergeConfig, UmmDistillConfig, UmmDistillTrainer, UmmMergeTrainer, UmmRewardTrainer, UpcycleConfig
from ummrm.hf.loading import load_checkpoint

PAIRS = 16
# By design the balancing loss of an accumulated step is the mean of its batches': the z-loss alone sums over tokens.
KINDS = {
    "token": UpcycleConfig(**{**CONFIG.to_dict(), "balancing_loss_coef": 0.0, "z_loss_coef": 1.0}),
    "sequence": SEQUENCE,
    "merging": CONFIG,
    "to merge": CONFIG,  # a mixture, which the trainer of the merge phase puts into it
    "distil": SEQUENCE,  # its merged model, of the mixture by its path
}


def make_start(kind, family="llama"):
    moe = make_moe(config=KINDS[kind], model_type=family)
    if kind == "distil":
        return ummrm.merge(moe)
    return ummrm.prepare_merge(moe, MergeConfig(learn_shared_share=True)) if kind == "merging" else moe


def save_starts(kinds, folder):
    """Models of (kind, family), each in a folder of its name; beside a student its teacher."""
    for kind, family in kinds:
        ummrm.save_pretrained(make_start(kind, family), f"{folder}/{kind}-{family}")
        if kind == "distil":
            make_moe(config=KINDS[kind], model_type=family).save_pretrained(f"{folder}/teacher")
            make_tokenizer().save_pretrained(f"{folder}/teacher")


def train(model, kind, folder, ranks=1, parts=1, save=False, teacher=None):
    """After one step on all pairs in `parts` batches: parameters gathered, the log with evaluation, normalisation."""
    of_phase = UmmMergeTrainer if "merg" in kind else UmmRewardTrainer
    trainer = (of_phase if teacher is None else functools.partial(UmmDistillTrainer, teacher=teacher))(
        model,
        settings(
            folder,
            RewardConfig if teacher is None else UmmDistillConfig,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.5,
            learning_rate=0.1,
            per_device_train_batch_size=PAIRS // ranks // parts,
            per_device_eval_batch_size=8 // ranks,
            gradient_accumulation_steps=parts,
            ddp_backend="gloo" if dist.is_initialized() else None,
            save_strategy="steps" if save else "no",
            save_steps=1,
            save_only_model=True,
        ),
        train_dataset=make_dataset(PAIRS, longest=30),
        eval_dataset=make_dataset(13, 1),  # whose last batch is filled up where ranks share it
        processing_class=make_tokenizer(),
    )
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e) | trainer.evaluate()
    normalization = trainer.normalize_rewards(make_dataset(7, 2))
    entry |= {"normalized_mean": normalization.mean, "normalized_std": normalization.std}
    if save:
        trainer.save_model(f"{folder}/whole")
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: full(p.detach()) for name, p in model.named_parameters()}, entry


def run_page(rank, folder, code):
    """One process of the page's script, in a folder with a mixture and pairs."""
    os.chdir(folder)
    exec(compile(code, "docs/scaling.md", "exec"), {"__name__": "page"})


def run(rank, cases, folder):
    """One process of several: cases of (name, kind, family, settings)."""
    from accelerate import ParallelismConfig

    # accelerate refuses tensor parallelism on CPUs, where all that it does for it, one batch for several, works
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    for name, kind, family, sizes in cases:
        model = load_checkpoint(f"{folder}/{kind}-{family}", distributed_config=sizes)
        ranks = sizes.get("fsdp_size", 1)
        more = {"save": name.endswith("saved"), "teacher": f"{folder}/teacher" if kind == "distil" else None}
        parameters, log = train(model, kind, f"{folder}/out-{name}", ranks, parts=2, **more)
        torch.save((parameters if rank == 0 else None, log), f"{folder}/{name}.{rank}.pt")
