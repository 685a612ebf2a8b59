"""LoRA on experts by sequence, FFNs' and linear layers': trained, saved, reloaded, resumed, folded and merged."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_peft import EXPERTS, SHARED, lora, make_trainer
from tiny_models import padded_batch
from transformers import AutoModelForSequenceClassification
from trl_inputs import SEQUENCE, make_moe

import ummrm
from ummrm import UmmMergeTrainer, UpcycleConfig
from ummrm.nn.upcycled_linear import UpcycledLinear, mixture_parts

LINEAR = UpcycleConfig(assignment="sequence", experts_in="linear")
ALL = UpcycleConfig(assignment="sequence", experts_in="all")
WITH_SHARED = UpcycleConfig(assignment="sequence", num_shared_experts=1, fixed_shared_weight=0.25)
FULL = pytest.mark.full
ATTENTION = [f"{name}_proj.expert_weight" for name in "qkvo"]
MODES = {
    "experts": (SEQUENCE, EXPERTS, []),
    "shared experts too": (WITH_SHARED, EXPERTS + SHARED, []),
    "linear experts": (ALL, EXPERTS + ATTENTION, []),  # whose heads, one for each expert, are trained in whole
    "experts and every linear layer": (SEQUENCE, EXPERTS, "all-linear"),
}


def adapted(mode, folder=None, **overrides):
    """A trainer with the mode's adapters on a fresh mixture, or on the mixture of a folder."""
    config, parameters, modules = MODES[mode]
    peft_config = lora(target_parameters=parameters, target_modules=modules)
    return make_trainer(
        overrides.pop("output"), folder or make_moe(config=config), peft_config=peft_config, **overrides
    )


@pytest.mark.parametrize("mode", [m if m.startswith(("lin", "exp")) else pytest.param(m, marks=FULL) for m in MODES])
def test_every_adapter_moves_and_what_is_frozen_stays(mode, tmp_path):
    trainer = adapted(mode, output=tmp_path, gradient_checkpointing=True, learning_rate=0.1)
    parameters = dict(trainer.model.named_parameters())
    trained = {n for n, p in parameters.items() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    assert any("self_attn" in n for n in trained) == (mode in ("linear experts", "experts and every linear layer"))
    assert any("shared_experts" in n for n in trained) == (mode == "shared experts too")
    before = {n: p.clone() for n, p in parameters.items()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name


def test_linear_experts_without_an_adapter_are_said(tmp_path):
    moe = make_moe(config=LINEAR)
    with pytest.warns(UserWarning, match='8 linear layers .* no adapter .*: "q_proj.expert_weight"'):
        make_trainer(tmp_path, moe, peft_config=lora(target_parameters=EXPERTS))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no adapter")
        make_trainer(tmp_path, make_moe(config=LINEAR), peft_config=lora(target_parameters=EXPERTS + ATTENTION))


@pytest.mark.parametrize("mode", ["linear experts", pytest.param("shared experts too", marks=FULL)])
def test_resume_save_reload_fold_and_merge(mode, tmp_path):
    make_moe(config=MODES[mode][0]).save_pretrained(tmp_path / "moe")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.1}
    whole = adapted(mode, str(tmp_path / "moe"), output=tmp_path / "a", **options)
    whole.train()
    again = adapted(mode, str(tmp_path / "moe"), output=tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name

    again.save_model(tmp_path / "adapters")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    loaded, batch = PeftModel.from_pretrained(base, tmp_path / "adapters").eval(), padded_batch()
    trained = again.model.eval()
    with torch.no_grad():
        expected, scores = trained(**batch).logits, trained.member_scores(**batch)
        torch.testing.assert_close(scores.mean(1, keepdim=True), expected)
        torch.testing.assert_close(loaded(**batch).logits, expected)
        with trained.disable_adapter():
            assert not torch.allclose(trained(**batch).logits, expected, atol=1e-3)
    for wrapped in (loaded, loaded.get_base_model()):
        for refused in (ummrm.prepare_merge, ummrm.merge):
            with pytest.raises(ValueError, match="must hold no adapters, got a .*merge_and_unload"):
                refused(wrapped)

    moe = loaded.merge_and_unload()
    assert {type(part).__module__.partition(".")[0] for part in mixture_parts(moe).values()} == {"ummrm"}
    with torch.no_grad():
        torch.testing.assert_close(moe.member_scores(**batch), scores, rtol=1e-4, atol=1e-5)
    before = dict(make_moe(config=MODES[mode][0]).named_parameters())
    for name, parameter in moe.named_parameters():
        if name.endswith("expert_weight") or ".experts." in name:
            difference = parameter - before[name]
            assert all(d.abs().max() > 1e-4 for d in difference), name  # every expert got its own update
            assert torch.linalg.matrix_rank(difference[0], rtol=1e-3) <= 2, name
    learning = make_trainer(tmp_path / "merge", moe, UmmMergeTrainer, max_steps=1)
    learning.train()
    with torch.no_grad():
        expected = learning.model.eval()(**batch).logits
        torch.testing.assert_close(learning.merge()(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_adapters_gradients_are_those_of_the_folded_linear_experts():
    wrapped = get_peft_model(make_moe(config=LINEAR), lora(target_parameters=ATTENTION)).train()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folded = make_moe(config=LINEAR).train()
    states = dict(wrapped.get_base_model().named_modules())
    for name, module in folded.named_modules():
        if isinstance(module, UpcycledLinear):
            module.expert_weight.data += states[name].get_delta_weight("default").detach()
    batch, groups = padded_batch(), torch.tensor([2, 0, 3])
    for parameter in wrapped.parameters():
        parameter.requires_grad_(True)
    for model in (wrapped, folded):
        model(**batch, groups=groups).logits.square().sum().backward()
    ours = {n.replace("base_layer.", "").replace("base_model.model.", ""): p for n, p in wrapped.named_parameters()}
    for name, parameter in folded.named_parameters():
        if not name.startswith("score"):
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_all_linear_leaves_linear_experts_alone():
    wrapped = get_peft_model(
        make_moe(config=UpcycleConfig(**{**LINEAR.to_dict(), "layers": (1,)})),
        lora(target_modules="all-linear", target_parameters=ATTENTION),
    )
    dense, upcycled = wrapped.get_base_model().model.layers
    assert hasattr(dense.self_attn.q_proj, "lora_A") and hasattr(dense.mlp.up_proj, "lora_A")
    assert isinstance(upcycled.self_attn.q_proj.base_layer, UpcycledLinear)
