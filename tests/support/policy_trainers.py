"""TRL's trainers of policies on tiny models, for what rewards them."""

import torch
from datasets import Dataset
from trl_inputs import make_pairs, make_tokenizer


def make_policy_trainer(trainer, config, policy, folder, reward, conversational):
    """A trainer of a policy that takes one step on the rewards of one reward function."""
    torch.manual_seed(0)
    prompts = [p["prompt"] for p in make_pairs(4)]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return trainer(
        policy,
        reward_funcs=[reward],
        args=config(
            str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=make_tokenizer(),
    )
