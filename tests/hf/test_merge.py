"""The merge phase: what is learned, what stays frozen, and that the exported model is what was trained."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import outputs_of, padded_batch, perturb_experts, tiny_model
from torch import nn

import ummrm
from ummrm import MergeConfig, UpcycleConfig, preference_loss, record_routing_statistics

CONFIG = UpcycleConfig(num_experts=4, num_experts_per_tok=2, num_shared_experts=2)


def moe_model(model_type="llama", config=CONFIG, dtype=torch.float32):
    return perturb_experts(ummrm.upcycle(tiny_model(model_type, dtype=dtype), config))


def pair_loss(model, chosen, rejected):
    return preference_loss(model(**chosen).logits, model(**rejected).logits)


@pytest.mark.parametrize("merge_config", [MergeConfig(), MergeConfig(alpha_per="projection", learn_shared_share=True)])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "bert"])
def test_learning_alpha_on_a_fixed_batch_beats_uniform_and_moves_alpha_alone(model_type, merge_config):
    torch.manual_seed(1)
    moe = ummrm.prepare_merge(moe_model(model_type), merge_config)
    chosen, rejected = padded_batch(lengths=(9, 5, 3, 7, 8)), padded_batch(lengths=(6, 8, 2, 9, 4))
    learned = {n: p for n, p in moe.named_parameters() if p.requires_grad}
    expected = {f"{name}.alpha" for name in ummrm.merge_coefficients(moe)}
    if merge_config.learn_shared_share:
        expected |= {n for n in learned if n.endswith("umm_merge_share.logit")}
        assert len(expected) == 3
    assert set(learned) == expected
    before = {n: t.clone() for n, t in moe.state_dict().items()}
    optimizer = torch.optim.Adam(learned.values(), lr=0.1)
    losses = []
    for _ in range(25):
        loss = pair_loss(moe, chosen, rejected)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-4
    for name, tensor in moe.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in learned), name
    torch.testing.assert_close(outputs_of(ummrm.merge(moe), chosen), outputs_of(moe, chosen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per", ["layer", "projection"])
def test_gradients_of_alpha_and_lambda_match_finite_differences(per):
    """In fp64, through the whole model and the loss (BERT: Llama's norms compute in fp32 whatever the dtype)."""
    torch.manual_seed(2)
    config = MergeConfig(alpha_per=per, learn_shared_share=True)
    moe = ummrm.prepare_merge(moe_model("bert", dtype=torch.float64), config)
    for name, p in moe.named_parameters():
        if p.requires_grad:
            module, _, leaf = name.rpartition(".")
            setattr(moe.get_submodule(module), leaf, nn.Parameter(torch.randn_like(p, dtype=torch.float64)))
    chosen, rejected = padded_batch(), padded_batch()
    learned = [p for p in moe.parameters() if p.requires_grad]
    analytic = torch.autograd.grad(pair_loss(moe, chosen, rejected), learned)
    step = 1e-5
    for parameter, gradient in zip(learned, analytic, strict=True):
        flat, numeric = parameter.data.view(-1), torch.empty(parameter.numel(), dtype=torch.float64)
        for i in range(flat.numel()):
            value = flat[i].item()
            losses = []
            for shift in (step, -step):
                flat[i] = value + shift
                losses.append(pair_loss(moe, chosen, rejected).item())
            flat[i] = value
            numeric[i] = (losses[0] - losses[1]) / (2 * step)
        assert gradient.abs().max() > 1e-5
        torch.testing.assert_close(gradient.view(-1), numeric, rtol=1e-4, atol=1e-7)


def test_a_learned_lambda_starts_at_its_configured_value_and_is_one_scalar_for_the_model():
    moe = ummrm.prepare_merge(moe_model(), MergeConfig(shared_share=0.75, learn_shared_share=True))
    logits = [n for n, _ in moe.named_parameters() if "umm_merge_share" in n]
    assert logits == ["model.umm_merge_share.logit"]
    for coefficients in ummrm.merge_coefficients(moe).values():
        torch.testing.assert_close(coefficients[:, :2].sum(-1), torch.full((3,), 0.75))


def test_alpha_from_measured_statistics():
    moe = moe_model()
    batch = padded_batch()
    with record_routing_statistics(moe) as statistics:
        moe(**batch)
    ummrm.prepare_merge(moe, MergeConfig(alpha_init="routing", shared_share=0.5), statistics)
    for name, coefficients in ummrm.merge_coefficients(moe).items():
        expected = 0.5 * statistics.gate_shares[name].float().clamp_min(1e-4)
        torch.testing.assert_close(coefficients[0, 2:], expected, rtol=1e-3, atol=1e-4)


def test_merging_leaves_the_moe_usable_and_separate():
    moe, batch = ummrm.prepare_merge(moe_model()), padded_batch()
    expected = outputs_of(moe, batch)
    merged = ummrm.merge(moe)
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
    assert torch.equal(outputs_of(moe, batch), expected)
    assert all(p.requires_grad for p in merged.parameters()) and not merged.training


@pytest.mark.parametrize("base", ["someone/dense-rm", ""])
def test_a_merged_model_carries_no_trace_of_ummrm(base, tmp_path):
    moe = moe_model()
    moe.config.umm_base_model = base or None
    moe.save_pretrained(tmp_path)
    moe = type(moe).from_pretrained(tmp_path)
    moe.gradient_checkpointing_enable()
    merged = ummrm.merge(ummrm.prepare_merge(moe))
    assert not merged.is_gradient_checkpointing
    assert not any(type(m).__module__.startswith("ummrm") for m in merged.modules())
    assert "umm" not in merged.config.to_json_string()
    assert not any("umm" in name.lower() for name in merged._no_split_modules)
    assert merged.config.model_type == "llama" and merged.config.architectures == ["LlamaForSequenceClassification"]
    assert merged.name_or_path == merged.config.name_or_path == base, "it is no copy of the mixture's folder"


SPOILT = {
    "NaN alpha": (
        "model.layers.1.mlp",
        "alpha",
        float("nan"),
        "'up' of {site} .* alpha is",
    ),
    "infinite alpha": ("model.layers.0.mlp", "alpha", float("inf"), "'up' of {site} .*: its merge weights are not"),
    "NaN expert": (
        "model.layers.1.mlp",
        "experts.down_proj",
        float("nan"),
        "'down' of {site} .*: experts.down_proj",
    ),
    "infinite shared": (
        "model.layers.0.mlp",
        "shared_experts.gate_up_proj",
        float("-inf"),
        "'up' of {site} .*: shared",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_merged_tensor_that_is_not_finite_is_an_error_that_names_it(case):
    site, name, value, message = SPOILT[case]
    moe = ummrm.prepare_merge(moe_model())
    with torch.no_grad():
        moe.get_parameter(f"{site}.{name}").view(-1)[1] = value
    with pytest.raises(ValueError, match="the merged tensor " + message.format(site=site)):
        ummrm.merge(moe)


def test_an_arbitrary_network_does_not_merge_into_one_that_is_not_finite():
    class FFN(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.down(F.relu(self.up(x)))

    config = UpcycleConfig(num_experts=2, num_experts_per_tok=1)
    moe = ummrm.prepare_merge(nn.Sequential(nn.Linear(4, 4), ummrm.UpcycledFFN.from_dense(FFN(), config)))
    ummrm.merge(moe)
    with torch.no_grad():
        moe[1].experts.down_proj_bias[0, 2] = float("nan")
    with pytest.raises(ValueError, match="tensor 'down.bias' of 1 is not finite: experts.down_proj_bias holds"):
        ummrm.merge(moe)


def unusable(case):
    moe = moe_model()
    if case == "dense":
        return lambda: ummrm.prepare_merge(tiny_model("llama"))
    if case == "merge dense":
        return lambda: ummrm.merge(tiny_model("llama"))
    if case == "not prepared":
        return lambda: ummrm.merge(moe)
    if case == "prepared twice":
        return lambda: ummrm.prepare_merge(ummrm.prepare_merge(moe))
    if case == "config":
        return lambda: ummrm.prepare_merge(moe, {"shared_share": 0.5})
    if case == "coefficients":
        return lambda: ummrm.merge_coefficients(moe)
    if case == "statistics missing":
        return lambda: ummrm.prepare_merge(moe, MergeConfig(alpha_init="routing"))
    if case == "statistics of another network":
        with record_routing_statistics(moe_model("gpt_neox")) as statistics:
            return lambda: ummrm.prepare_merge(moe, MergeConfig(alpha_init="routing"), statistics)
    with record_routing_statistics(moe) as statistics:
        return lambda: ummrm.prepare_merge(moe, MergeConfig(alpha_init="routing"), statistics)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("dense", TypeError, "must hold UpcycledFFN modules, got a LlamaForSequenceClassification .*upcycle first"),
        ("merge dense", TypeError, "must be in its merge phase, got a LlamaForSequenceClassification with no experts"),
        ("not prepared", TypeError, r"call ummrm.prepare_merge\(moe, MergeConfig\(\)\) first"),
        ("prepared twice", TypeError, "in its merge phase already"),
        ("config", TypeError, "`config` must be a MergeConfig, got dict"),
        ("coefficients", TypeError, "must be in its merge phase"),
        ("statistics missing", ValueError, "`statistics` must be given .*record_routing_statistics"),
        ("statistics of another network", ValueError, "recorded on this network"),
        ("statistics empty", ValueError, "with live tokens; it has none for model.layers.0.mlp"),
    ],
)
def test_misuse_is_a_clear_error(case, error, message):
    with pytest.raises(error, match=message):
        unusable(case)()


def test_a_refused_prepare_merge_changes_nothing():
    moe, batch = moe_model(), padded_batch()
    expected, flags = outputs_of(moe, batch), [p.requires_grad for p in moe.parameters()]
    with pytest.raises(ValueError, match="`statistics` must be given"):
        ummrm.prepare_merge(moe, MergeConfig(alpha_init="routing"))
    assert torch.equal(outputs_of(moe, batch), expected)
    assert [p.requires_grad for p in moe.parameters()] == flags and moe.config.umm_phase == "mixture"


def test_a_model_loss_in_the_merge_phase_has_no_auxiliary_part():
    moe = ummrm.prepare_merge(moe_model()).train()
    batch = padded_batch()
    out = moe(**batch, labels=torch.randn(3))
    assert ummrm.auxiliary_loss(moe).item() == 0
    assert torch.isfinite(F.relu(out.loss))
