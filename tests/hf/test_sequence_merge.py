"""Merging what was assigned by sequence: straight from a mixture, linear experts too, saved and loaded strictly."""

import copy
import json

import pytest
import torch
from tiny_models import outputs_of, padded_batch, perturb_experts, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import MergeConfig, UpcycleConfig, preference_loss
from ummrm.nn.upcycled_linear import mixture_parts

LINEAR = UpcycleConfig(assignment="sequence", num_experts=3, experts_in="linear")
ALL = UpcycleConfig(assignment="sequence", num_experts=3, experts_in="all")
SHARED = UpcycleConfig(assignment="sequence", num_experts=3, num_shared_experts=2, fixed_shared_weight=0.25)
SHARE = "model.umm_merge_share.share"


def mixture(config, model_type="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return perturb_experts(ummrm.upcycle(tiny_model(model_type, dtype=dtype), config))


@pytest.mark.parametrize("config", [LINEAR, ALL, SHARED], ids=["linear", "all", "shared"])
def test_a_mixture_merges_as_it_is_into_the_weighted_mean_of_its_members(config):
    moe, batch = mixture(config).train(), padded_batch()
    moe.model.layers[0].requires_grad_(False)
    flags, state = [p.requires_grad for p in moe.parameters()], copy.deepcopy(moe.state_dict())
    merged = ummrm.merge(moe)
    assert (
        moe.config.umm_phase == "mixture"
        and moe.training
        and len(mixture_parts(moe)) == {"linear": 10, "all": 11, "ffn": 2}[config.experts_in]
    )
    assert [p.requires_grad for p in moe.parameters()] == flags
    assert all(p.requires_grad for p in merged.parameters()) and not merged.training
    assert not any(type(m).__module__.startswith("ummrm") for m in merged.modules())
    for layer, dense in zip(moe.model.layers, merged.model.layers, strict=True):
        mean = layer.mlp.experts.down_proj.mean(0)
        if config is SHARED:
            mean = torch.lerp(mean, layer.mlp.shared_experts.down_proj.mean(0), 0.25)
        else:
            torch.testing.assert_close(dense.self_attn.v_proj.weight, layer.self_attn.v_proj.expert_weight.mean(0))
        torch.testing.assert_close(dense.mlp.down_proj.weight, mean)
    if config is ALL:
        torch.testing.assert_close(merged.score.weight, moe.score.expert_weight.mean(0))
    expected = {key: tensor.clone() for key, tensor in merged.state_dict().items()}
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, state[key]) for key, tensor in moe.state_dict().items())
    moe.eval()
    prepared = ummrm.prepare_merge(moe)
    again = ummrm.merge(prepared)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    torch.testing.assert_close(outputs_of(again, batch), outputs_of(prepared, batch), rtol=1e-5, atol=1e-6)


def test_gradients_of_every_alpha_match_finite_differences():
    """In fp64, through the whole model and the loss (BERT: Llama's norms compute in fp32 whatever the dtype)."""
    moe = ummrm.prepare_merge(mixture(ALL, "bert", torch.float64))
    for name, p in moe.named_parameters():
        if p.requires_grad:
            module, _, leaf = name.rpartition(".")
            setattr(moe.get_submodule(module), leaf, nn.Parameter(torch.randn_like(p, dtype=torch.float64)))
    batches = padded_batch(), padded_batch()

    def loss():
        return preference_loss(*(moe(**batch).logits for batch in batches))

    learned = [p for p in moe.parameters() if p.requires_grad]
    assert len(learned) == 2 * 5 + 1
    analytic, step = torch.autograd.grad(loss(), learned), 1e-5
    for parameter, gradient in zip(learned, analytic, strict=True):
        i = int(gradient.abs().argmax())
        value, losses = parameter.data[i].item(), []
        for shift in (step, -step):
            parameter.data[i] = value + shift
            losses.append(loss().item())
        parameter.data[i] = value
        numeric = torch.tensor((losses[0] - losses[1]) / (2 * step), dtype=torch.float64)
        torch.testing.assert_close(gradient[i], numeric, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(gradient.sum(), gradient.sum() * 0, rtol=0, atol=1e-12)  # of a softmax


@pytest.mark.parametrize("prepared", [False, True], ids=["mixture", "merging"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.self_attn.k_proj.expert_weight", float("nan"), "'weight' of {site} .*: expert_weight holds"),
        ("model.layers.0.mlp.experts.down_proj", float("inf"), "'down' of {site} .*: experts.down_proj"),
    ],
)
def test_a_merged_tensor_that_is_not_finite_is_an_error_that_names_it(name, value, message, prepared):
    moe = mixture(LINEAR)
    moe = ummrm.prepare_merge(moe) if prepared else moe
    with torch.no_grad():
        moe.get_parameter(name).view(-1)[1] = value
    site = name.removesuffix(".experts.down_proj").removesuffix(".expert_weight")
    with pytest.raises(ValueError, match="the merged tensor " + message.format(site=site)):
        ummrm.merge(moe)


def test_merge_weights_that_diverged_are_named_for_linear_experts():
    moe = ummrm.prepare_merge(mixture(LINEAR))
    with torch.no_grad():
        moe.model.layers[1].self_attn.o_proj.alpha[0] = float("nan")
    with pytest.raises(ValueError, match="'weight' of model.layers.1.self_attn.o_proj .* alpha is"):
        ummrm.merge(moe)


@pytest.mark.parametrize("config", [ALL, SHARED], ids=["all", "shared"])
def test_lambda_is_the_mixtures_own_in_weights_and_configuration(config, tmp_path):
    share, other = (0.0, 0.5) if config is ALL else (0.25, 0.7)
    ummrm.prepare_merge(mixture(config)).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.state_dict()[SHARE], torch.tensor([share]))
    assert loaded.config.merge_config == MergeConfig(shared_share=share)
    learned = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert len(learned) == len(mixture_parts(mixture(config))) and all(n.endswith(".alpha") for n in learned)
    assert {p.dtype for n, p in loaded.named_parameters() if n in learned} == {torch.float32}
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["umm_merge"]["shared_share"] = other
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="shared_share"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
