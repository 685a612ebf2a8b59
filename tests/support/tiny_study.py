"""A study of seconds: the smallest models, tasks and numbers of steps that still exercise every arm."""

import copy

from lab import StudyConfig

_TASK = {
    "train_pairs": 96,
    "test_pairs": 32,
    "topics": 4,
    "instruction_regimes": 2,
    "content_tokens": 8,
    "prompts": 4,
    "samples": 16,
}
_STUDY = {
    "name": "tiny",
    "seeds": 1,
    "processes": 1,
    "regimes": {"planted": {"title": "planted", "task": _TASK}},
    "model": {
        "model_type": "llama",
        "options": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        },
    },
    "dense": {"steps": 5, "batch_size": 8},
    "upcycle": {"num_experts": 3, "num_experts_per_tok": 2},
    "moe": {"steps": 4, "batch_size": 8},
    "alpha": {"steps": 2, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 0, "weight_decay": 0.0},
    "members": 2,
    "policy": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 1,
        "num_heads": 2,
        "steps": 12,
        "warmup_steps": 2,
        "batch_size": 32,
    },
    "ppo": {"steps": 2, "batch_size": 8, "normalisation_samples": 32},
    "measure": {
        "fixed_kl": 1.0,
        "ppo_fixed_kl": 0.5,
        "ppo_window": 1,
        "reference_pairs": 16,
        "specialisation_points": 2,
        "specialisation_pairs": 8,
        "latency_batch": 4,
        "latency_rounds": 1,
    },
    "arms": {
        "dense": {"kind": "dense", "ppo": True},
        "dense_longer": {"kind": "dense_longer"},
        "moe": {"kind": "moe"},
        "merged": {"kind": "merged", "label": "merged, learned", "ppo": True},
    },
    "secondary": [{"outcome": "accuracy"}, {"optimiser": "ppo", "outcome": "gold_end", "against": "dense"}],
}


def tiny_study(arms=None, **changes):
    """The tiny study with other arms or fields."""
    data = copy.deepcopy(_STUDY) | changes
    if arms is not None:
        data["arms"] = data["arms"] | arms
    return StudyConfig.from_dict(data)


def two_regimes(**changes):
    """The tiny study in a second regime too, without the plant."""
    unplanted = {"title": "unplanted", "task": {**_TASK, "shortcut_share": 0.5}}
    return tiny_study(regimes={**copy.deepcopy(_STUDY["regimes"]), "unplanted": unplanted}, **changes)
