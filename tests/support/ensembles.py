"""What tests of ensembles and distillation share: mixtures that score several members at once."""

import torch
from tiny_models import tiny_model

import ummrm

CONFIG = ummrm.UpcycleConfig(assignment="sequence", num_experts=4)


def mixture(seed=0):
    """A tiny mixture assigned by sequence whose members differ."""
    torch.manual_seed(seed)
    moe = ummrm.upcycle(tiny_model("llama"), CONFIG)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if "experts." in name:
                parameter.add_(0.6 * parameter.std() * torch.randn_like(parameter))
    return moe
