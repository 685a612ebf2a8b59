"""What tests of ensembles and distillation share: mixtures that score several members at once."""

import copy
import types

import torch
from tiny_models import perturb_experts, tiny_model
from trl_inputs import CONFIG

import ummrm


def mixture(seed=0):
    """A tiny mixture whose members are dense models, each made of one expert: what assignment by sequence trains."""
    torch.manual_seed(seed)
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIG), scale=0.6)
    singles = []
    for expert in range(CONFIG.num_experts):
        merging = ummrm.prepare_merge(_copy(moe), ummrm.MergeConfig(shared_share=0.0))
        for ffn in (layer.mlp for layer in merging.model.layers):
            ffn.alpha.data.fill_(-1e9)[..., expert] = 1e9
        singles.append(ummrm.merge(merging))

    def member_scores(self, **inputs):
        return torch.cat([single(**inputs).logits for single in singles], 1)

    moe.member_scores = types.MethodType(member_scores, moe)
    moe.singles = [singles]  # in a list, so that they are no part of the network
    return moe


def merged(moe):
    """The mixture merged by its experts' mean."""
    return ummrm.merge(ummrm.prepare_merge(_copy(moe), ummrm.MergeConfig(shared_share=0.0)))


def _copy(moe):
    fresh = type(moe)(copy.deepcopy(moe.config))
    fresh.load_state_dict(moe.state_dict())
    return fresh.eval()
