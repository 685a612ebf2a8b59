"""Networks with no Hugging Face class around them, dense and upcycled, as a user of plain PyTorch has them."""

import torch
import torch.nn.functional as F
from test_dense import Gated
from torch import nn

from ummrm import UpcycleConfig, UpcycledFFN

HIDDEN = 10
SMALL = UpcycleConfig(num_experts=4, num_experts_per_tok=2, num_shared_experts=2)


def perturbed(ffn, config=SMALL):
    moe = UpcycledFFN.from_dense(ffn, config)
    with torch.no_grad():
        for p in moe.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return moe


class TwoLayer(nn.Module):
    """Somebody's own network."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, HIDDEN)
        self.ffns = nn.ModuleList(Gated(F.gelu, bias=True) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x):
        x = self.embed(x)
        for ffn in self.ffns:
            x = x + ffn(x)
        return self.head(x)


def upcycled_network(config=SMALL):
    network = TwoLayer()
    for i, ffn in enumerate(network.ffns):
        network.ffns[i] = UpcycledFFN.from_dense(ffn, config)
    return network
