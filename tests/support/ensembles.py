"""What tests of ensembles and distillation share: mixtures that score several members at once."""

import torch
from tiny_models import perturb_experts, tiny_model

import ummrm

CONFIG = ummrm.UpcycleConfig(assignment="sequence", num_experts=4)


def mixture(seed=0):
    """A tiny mixture assigned by sequence whose members differ."""
    torch.manual_seed(seed)
    return perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIG), scale=0.6)
