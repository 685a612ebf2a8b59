"""A study from a pretrained backbone in seconds: the smallest models and tasks that still exercise each kind of arm."""

import copy

from lab.backbone.config import BackboneStudy

_TASK = {
    "kind": "language",
    "train_pairs": 48,
    "test_pairs": 32,
    "prompts": 4,
    "samples": 16,
    "corpus": 64,
    "unlabelled": 64,
}
_STUDY = {
    "kind": "backbone",
    "name": "tiny",
    "seeds": 3,
    "block": 2,
    "processes": 1,
    "batch": 4,
    "student_batch": 8,
    "regimes": {
        "idiosyncratic": {"title": "no plant", "task": _TASK, "without": ["weighted", "counterfactual"]},
        "planted": {"title": "planted", "task": {**_TASK, "shortcut_share": 0.7}},
    },
    "model": {"hidden_size": 8, "intermediate_size": 12, "num_layers": 2},
    "pretraining": {"steps": 4, "batch": 8},
    "measure": {"fixed_kl": 1.0},
    "arms": {
        "dense": {"kind": "dense", "label": "dense model", "rates": [1e-3, 1e-2], "steps": [3, 5], "runs": 2},
        "runs": {"kind": "ensemble", "of": "dense", "of_rates": [1e-3], "of_steps": [3]},
        "warm": {"kind": "weight_average", "of": "dense", "of_rates": [1e-3], "of_steps": [3]},
        "sequence": {"kind": "sequence", "rates": [1e-2], "steps": [4], "sequencing": {"experts": 2}},
        "members": {"kind": "ensemble", "of": "sequence", "rule": "uwo"},
        "distilled": {"kind": "distilled", "of": "members", "student": "sequence", "rates": [1e-3], "steps": [3]},
        "fresh": {"kind": "distilled", "of": "runs", "rates": [1e-3], "steps": [3]},
        "shared": {
            "kind": "sequence",
            "rates": [1e-2],
            "steps": [4],
            "sequencing": {"experts": 2, "shared_weight": 0.5},
        },
        "shared_members": {"kind": "ensemble", "of": "shared"},
        "token": {
            "kind": "token",
            "rates": [1e-2],
            "steps": [5],
            "alpha_steps": 2,
            "upcycle": {"num_experts": 3, "num_experts_per_tok": 2},
        },
        "mixture": {"kind": "mixture", "of": "token"},
        "weighted": {"kind": "dense", "pairs": "weighted", "rates": [1e-3], "steps": [3]},
        "counterfactual": {"kind": "dense", "pairs": "counterfactual", "rates": [1e-3], "steps": [3]},
    },
}


def tiny_backbone(**changes):
    """The tiny study with other fields."""
    return BackboneStudy.from_dict(copy.deepcopy(_STUDY) | changes)
