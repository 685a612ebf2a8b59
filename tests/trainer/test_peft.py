"""LoRA on the experts through PEFT's `target_parameters`: trained, saved, reloaded, folded in, and merged after."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import padded_batch
from transformers import AutoModelForSequenceClassification
from trl import RewardTrainer
from trl_inputs import CONFIG, make_dataset, make_moe, make_tokenizer, settings

import ummrm
from ummrm import UmmMergeTrainer, UmmRewardTrainer
from ummrm.nn.experts import Experts
from ummrm.nn.router import Router

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SHARED = ["shared_experts.gate_up_proj", "shared_experts.down_proj"]


def lora(**overrides):
    options = {"target_modules": [], "target_parameters": EXPERTS + SHARED, "modules_to_save": ["score"]}
    return LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=8, **{**options, **overrides})


def make_trainer(folder, model=None, trainer=UmmRewardTrainer, **overrides):
    config = overrides.pop("peft_config", None)
    return trainer(
        make_moe() if model is None else model,
        settings(folder, **overrides),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


MODES = {
    "experts": {},
    "routed experts": {"target_parameters": EXPERTS},
    "experts and router": {"modules_to_save": ["score", "router"]},
    "experts and every linear layer": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_every_adapter_moves_and_what_is_frozen_stays(mode, checkpointing, tmp_path):
    trainer = make_trainer(
        tmp_path, peft_config=lora(**MODES[mode]), gradient_checkpointing=checkpointing, learning_rate=0.1
    )
    parameters = dict(trainer.model.named_parameters())
    trained = {n for n, p in parameters.items() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    wrapped_linears = {n for n in trained if "self_attn" in n}
    assert bool(wrapped_linears) == (mode == "experts and every linear layer")
    routers = {n for n in trained if "router" in n}
    assert len(routers) == (2 if "router" in mode else 0)
    assert any("shared_experts" in n for n in trained) == (mode != "routed experts")
    before = {n: p.clone() for n, p in parameters.items()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name


def test_all_linear_leaves_routers_and_experts_alone():
    wrapped = get_peft_model(make_moe(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2))
    for module in wrapped.get_base_model().model.layers:
        assert type(module.mlp.router) is Router and type(module.mlp.experts) is Experts
        assert type(module.self_attn.q_proj).__name__ == "Linear" and hasattr(module.self_attn.q_proj, "lora_A")


def test_train_save_reload_fold_and_merge(tmp_path):
    make_moe().save_pretrained(tmp_path / "moe")
    trainer = make_trainer(
        tmp_path / "run",
        str(tmp_path / "moe"),
        peft_config=lora(modules_to_save=["score", "router"]),
        learning_rate=0.1,
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapters")
    batch = padded_batch()
    trained = trainer.model.eval()
    with torch.no_grad():
        expected = trained(**batch).logits
        with trained.disable_adapter():
            assert not torch.allclose(trained(**batch).logits, expected, atol=1e-3)

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected)
    with pytest.raises(ValueError, match="must hold no adapters, got a PeftModel.*merge_and_unload"):
        ummrm.prepare_merge(loaded)
    with pytest.raises(ValueError, match="must hold no adapters"):
        ummrm.prepare_merge(loaded.get_base_model())
    with pytest.raises(TypeError, match="fold its adapters first: model.merge_and_unload"):
        make_trainer(tmp_path / "merge", loaded, UmmMergeTrainer)

    before = {n: p.clone() for n, p in make_moe().named_parameters() if "experts." in n}
    moe = loaded.merge_and_unload()
    assert type(moe).__name__ == "UmmLlamaForSequenceClassification"
    for module in (moe.model.layers[0].mlp, moe.model.layers[1].mlp):
        assert type(module.experts) is type(module.shared_experts) is Experts and type(module.router) is Router
    with torch.no_grad():
        torch.testing.assert_close(moe(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in moe.named_parameters():
        if name in before:
            difference = parameter - before[name]
            assert all(d.abs().max() > 1e-4 for d in difference), name  # every expert got its own update
            assert torch.linalg.matrix_rank(difference[0], rtol=1e-3) <= 2, name

    learning = make_trainer(tmp_path / "merge", moe, UmmMergeTrainer)
    learning.train()
    merged = learning.merge()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, learning.model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_the_adapters_gradients_are_those_of_the_folded_experts():
    """What the router and each expert get under an adapter equals what plain experts of the folded weights get."""
    wrapped = get_peft_model(make_moe(), lora()).train()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folded = make_moe().train()
    states = dict(wrapped.get_base_model().named_modules())
    for i in range(2):
        for kind in ("experts", "shared_experts"):
            wrapper = states[f"model.layers.{i}.mlp.{kind}"]
            target = folded.get_submodule(f"model.layers.{i}.mlp.{kind}")
            while hasattr(wrapper, "base_layer"):
                delta = wrapper.get_delta_weight("default").detach()
                getattr(target, wrapper.parameter_name).data += delta
                wrapper = wrapper.base_layer
    batch = padded_batch()
    for parameter in (*wrapped.parameters(),):
        parameter.requires_grad_(True)
    for model in (wrapped, folded):
        (model(**batch).logits.square().sum() + ummrm.auxiliary_loss(model)).backward()
    ours = {n.replace("base_layer.", "").replace("base_model.model.", ""): p for n, p in wrapped.named_parameters()}
    for name, parameter in folded.named_parameters():
        if not name.startswith("score"):
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_resuming_equals_an_uninterrupted_run(tmp_path):
    make_moe().save_pretrained(tmp_path / "moe")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.05}
    whole = make_trainer(tmp_path / "a", str(tmp_path / "moe"), peft_config=lora(), **options)
    whole.train()
    again = make_trainer(tmp_path / "b", str(tmp_path / "moe"), peft_config=lora(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_normalisation_of_adapters_is_kept_by_the_folded_model(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=lora(), max_steps=1)
    with pytest.warns(UserWarning, match="saving adapters saves no model configuration"):
        normalization = trainer.normalize_rewards()
    assert ummrm.reward_normalization(trainer.model.merge_and_unload()) == normalization


def test_one_expert_of_a_kind_takes_adapters_too():
    config = ummrm.UpcycleConfig(**{**CONFIG.to_dict(), "num_experts": 1, "num_experts_per_tok": 1, "gate": "fixed"})
    wrapped, batch = get_peft_model(make_moe(config=config), lora()), padded_batch()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = wrapped(**batch).logits
        folded = wrapped.merge_and_unload()
        torch.testing.assert_close(folded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(make_moe(config=config)(**batch).logits, expected, atol=1e-3)


def test_trls_own_trainer_trains_adapters_without_auxiliary_losses(tmp_path):
    trainer = make_trainer(tmp_path, trainer=RewardTrainer, peft_config=lora(), max_steps=1)
    trainer.train()
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)
