"""UmmRewardTrainer by sequence: the groups of each step, accumulated, resumed, checkpointed, evaluated by the mean."""

import subprocess
import sys

import pytest
import torch
from checkout import SUPPORT
from datasets import IterableDataset
from test_trainer import batch_of, logged, make_trainer
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification
from trl import RewardTrainer
from trl_child import train
from trl_inputs import SEQUENCE, make_dataset, make_moe, make_tokenizer, settings

import ummrm
from ummrm import UmmMergeTrainer, UpcycleConfig, preference_loss

E = SEQUENCE.num_experts
KINDS = {
    "ffn": SEQUENCE,
    "linear": UpcycleConfig(assignment="sequence", experts_in="linear"),
    "all": UpcycleConfig(assignment="sequence", experts_in="all"),
    "shared": UpcycleConfig(assignment="sequence", num_shared_experts=1, fixed_shared_weight=0.25),
    "upper layer": UpcycleConfig(assignment="sequence", layers=(1,)),
}


FULL = pytest.mark.full


def in_full(value):
    return pytest.param(value, marks=FULL)


def trainer_of(folder, kind="ffn", **overrides):
    model = overrides.pop("model", None)
    return make_trainer(folder, make_moe(config=KINDS[kind]) if model is None else model, **overrides)


def watch(trainer):
    """The groups of every training batch from here on, by step, and the lengths of its rows."""
    seen = []
    stock = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        if model.training:
            seen.append(
                (trainer.state.global_step, inputs["groups"].tolist(), inputs["attention_mask"].sum(1).tolist())
            )
        return stock(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    return seen


@pytest.mark.parametrize(
    ("size", "accumulated", "pairs"),
    [(2, 4, 16), (2, 2, 9), pytest.param(2, 1, 4, marks=FULL), pytest.param(4, 1, 10, marks=FULL)],
    ids=str,
)
def test_groups_are_drawn_over_a_steps_pairs(size, accumulated, pairs, tmp_path):
    """Over all its batches, with fewer pairs than experts, and with a last step of fewer or odd ones."""
    trainer = trainer_of(
        tmp_path,
        dataset=make_dataset(pairs),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        max_steps=-1,
        num_train_epochs=1,
        seed=7,
    )
    seen = watch(trainer)
    trainer.train()
    assert sum(len(groups) for _, groups, _ in seen) == 2 * pairs
    for step in range(trainer.state.global_step):
        of_step = [groups for at, groups, _ in seen if at == step]
        drawn = []
        for groups in of_step:
            chosen, rejected = groups[: len(groups) // 2], groups[len(groups) // 2 :]
            assert chosen == rejected
            drawn += chosen
        assert drawn == ummrm.draw_groups(len(drawn), E, seed=7, step=step).tolist()
        counts = torch.bincount(torch.tensor(drawn), minlength=E)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("kind", ["all", "shared", in_full("linear"), in_full("ffn"), in_full("upper layer")])
def test_a_step_trains_on_the_loss_of_its_definition(kind, tmp_path):
    data = make_dataset(6, kind="margin")
    options = {"per_device_train_batch_size": 6, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0}
    trainer = trainer_of(tmp_path, kind, dataset=data, center_rewards_coefficient=0.3, learning_rate=0.1, **options)
    seen, looped, ready = watch(trainer), make_moe(config=KINDS[kind]).train(), trainer.train_dataset
    before = {n: p.detach().clone() for n, p in looped.named_parameters()}
    trainer.train()
    ((_, groups, lengths),) = seen
    batch = batch_of(ready)
    at = {tuple(pair): i for i, pair in enumerate(zip(*[map(len, ready[f"{k}_ids"]) for k in KEYS], strict=True))}
    assert len(at) == 6, "the pairs are told apart by their lengths"
    order = [at[pair] for pair in zip(lengths[:6], lengths[6:], strict=True)]
    losses = []
    for pair, member in zip(order, groups[:6], strict=True):
        rows = {name: tensor[[pair, pair + 6]] for name, tensor in batch.items()}
        rewards = looped(**rows, groups=torch.tensor([member, member])).logits.flatten()
        margin = torch.tensor([ready["margin"][pair]])
        losses.append(preference_loss(rewards[:1], rewards[1:], margin) + 0.3 * rewards.sum().square())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]
    assert not any("aux_loss" in entry or "load_balancing_loss" in entry for entry in trainer.state.log_history)
    for (name, trained), parameter in zip(trainer.model.named_parameters(), looped.parameters(), strict=True):
        expected = before[name] - 0.1 * parameter.grad
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6, msg=name)
        if "experts." in name or "expert_" in name:
            moved = (trained - before[name]).flatten(1).abs().amax(1)
            assert (moved > 0).all() if "shared" not in name else moved.max() > 0, name


KEYS = ("chosen", "rejected")


@pytest.mark.parametrize("kind", ["linear", in_full("shared")])
def test_accumulated_gradients_are_those_of_one_batch(kind, tmp_path):
    """Up to the rounding of a sum in another order."""
    options = {"dataset": make_dataset(8, longest=30), "max_steps": 1, "optim": "sgd", "max_grad_norm": 0}
    whole = trainer_of(tmp_path, kind, per_device_train_batch_size=8, **options)
    whole.train()
    parts = trainer_of(tmp_path, kind, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    parts.train()
    start = dict(make_moe(config=KINDS[kind]).named_parameters())
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)
        assert (a - start[name]).abs().max() > 1e-5, name
    for key in ("loss", "accuracy", "std_reward"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), rel=1e-4), key


def test_a_last_batch_of_fewer_pairs_counts_for_fewer(tmp_path):
    """6 pairs in one batch, or 4 and 2."""
    options = {"dataset": make_dataset(6), "max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.1}
    whole = trainer_of(tmp_path, per_device_train_batch_size=6, **options)
    whole.train()
    parts = trainer_of(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    parts.train()
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)


@pytest.mark.full
def test_two_processes_that_accumulate_equal_one_batch(tmp_path):
    script = SUPPORT / "trl_child.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run(
        [*launch, str(tmp_path), "sequence"], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    theirs, log = torch.load(tmp_path / "out.pt", weights_only=False)
    ours, alone, _ = train(tmp_path / "one", "sequence", per_device_train_batch_size=16)
    for name, parameter in ours.items():
        torch.testing.assert_close(theirs[name], parameter, rtol=1e-4, atol=1e-6, msg=name)
    for key in (
        "loss",
        "accuracy",
        "std_reward",
        "eval_std_reward",
        "eval_loss",
        "eval_mean_reward",
    ):
        assert log[key] == pytest.approx(alone[key], rel=1e-4), key
    a, b = log["normalization"], alone["normalization"]
    assert (a.mean, a.std) == pytest.approx((b.mean, b.std), rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", in_full("ffn")])
def test_resuming_equals_an_uninterrupted_run(kind, tmp_path):
    """Bit for bit, groups and all, in the middle of an epoch and with a last step of fewer pairs."""
    options = {"dataset": make_dataset(10), "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = trainer_of(tmp_path / "a", kind, **options)
    groups = watch(whole)
    whole.train()
    again = trainer_of(tmp_path / "b", model=make_moe(1, config=KINDS[kind]), **options)
    resumed = watch(again)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed == [entry for entry in groups if entry[0] >= 2] and resumed
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for key in ("loss", "learning_rate", "accuracy", "std_reward", "grad_norm"):
        assert logged(again, key) == logged(whole, key), key
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b" / "checkpoint-5")
    for (name, a), b in zip(whole.model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
    other = trainer_of(tmp_path / "c", "shared", **options)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be of the model .* has umm="):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize("mode", ["checkpointing", "bf16", in_full("compiled")])
@pytest.mark.parametrize("kind", ["linear", in_full("shared")])
def test_other_modes_give_the_same_training(kind, mode, tmp_path):
    options = {
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    }
    plain = trainer_of(tmp_path, kind, max_steps=2)
    plain.train()
    other = trainer_of(tmp_path, kind, max_steps=2, **options[mode])
    other.train()
    assert other.model.is_gradient_checkpointing == (mode == "checkpointing")
    assert all(p.dtype == torch.float32 for p in other.model.parameters())
    rel = {"checkpointing": 1e-5, "bf16": 3e-2, "compiled": 1e-4}[mode]
    assert logged(other, "loss") == pytest.approx(logged(plain, "loss"), rel=rel)
    if mode == "bf16":
        assert logged(other, "loss") != logged(plain, "loss")
    elif mode == "checkpointing":
        for (name, a), b in zip(plain.model.named_parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_every_parameter_moves_and_frozen_ones_stay(tmp_path):
    model = make_moe(config=KINDS["shared"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" not in name and "shared_experts" not in name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = trainer_of(tmp_path, model=model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_evaluation_is_the_members_mean_or_a_named_member(tmp_path):
    trainer = trainer_of(tmp_path, "linear", eval_dataset=make_dataset(7, 1), max_steps=1, per_device_eval_batch_size=8)
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        scores = model.member_scores(**batch_of(trainer.eval_dataset))
    assert scores.shape == (14, E) and scores.std(1).min() > 1e-5
    for evaluation, rewards in (("mean", scores.mean(1)), (2, scores[:, 2])):
        ummrm.set_evaluation(model, evaluation)
        chosen, rejected = rewards.chunk(2)
        expected = {
            "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean(),
            "mean_reward": rewards.mean(),
            "std_reward": rewards.std(correction=0),
            "loss": preference_loss(chosen, rejected),
        }
        metrics = trainer.evaluate()
        for key, value in expected.items():
            assert metrics[f"eval_{key}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key
        assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(metrics["eval_loss"])


@pytest.mark.filterwarnings("ignore:.*fresh head")
def test_fresh_heads_train_with_their_experts_and_teach_the_merged_model(tmp_path):
    moe = ummrm.upcycle(tiny_model("llama", "CausalLM"), KINDS["all"], new_head=True, seed=1)
    before = moe.score.expert_weight.detach().clone()
    trainer = trainer_of(tmp_path, model=moe, max_steps=2, learning_rate=1e-3)
    trainer.train()
    mixture = trainer.model.eval()
    assert (mixture.score.expert_weight - before).flatten(1).abs().amax(1).min() > 0
    student, data = ummrm.merge(mixture), make_dataset(8, kind="explicit")
    torch.testing.assert_close(student.score.weight, mixture.score.expert_weight.mean(0))
    weights = student.score.weight.detach().clone()
    distilling = settings(tmp_path / "distilled", ummrm.UmmDistillConfig, max_steps=1, learning_rate=1e-3)
    done = ummrm.distill(student, mixture, data, make_tokenizer(), distilling)
    assert type(done).__name__ == "LlamaForSequenceClassification" and not torch.equal(done.score.weight, weights)


@pytest.mark.parametrize("accumulated", [2, 1])
def test_a_stream_is_trained_on_over_its_end(accumulated, tmp_path):
    rows, steps = list(make_dataset(16)), 6 // accumulated  # 4 batches, and again
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = trainer_of(tmp_path, dataset=stream, max_steps=steps, gradient_accumulation_steps=accumulated)
    seen = watch(trainer)
    trainer.train()
    assert [step for step, _, _ in seen] == [step for step in range(steps) for _ in range(accumulated)]
    if accumulated == 1:
        return
    drawn = [g for step, groups, _ in seen if step == 1 for g in groups[:4]]
    assert drawn == ummrm.draw_groups(8, E, seed=trainer.args.seed, step=1).tolist()


def test_rewards_are_normalised_and_the_card_is_written(tmp_path):
    model = make_moe(config=SEQUENCE)
    model.config.umm_base_model = "someone/dense-rm"
    trainer = trainer_of(tmp_path / "run", model=model, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    normalization = trainer.normalize_rewards(make_dataset(7, 5))
    data = make_trainer(tmp_path, make_moe(config=SEQUENCE), dataset=make_dataset(7, 5)).train_dataset
    with torch.no_grad():
        scores = trainer.model.eval().member_scores(**batch_of(data)).mean(1).double()
    assert (normalization.mean, normalization.std) == pytest.approx(
        (scores.mean().item(), scores.std(correction=0).item()), rel=1e-4
    )
    text = (tmp_path / "run" / "README.md").read_text()
    assert "2512.00724" in text and "`someone/dense-rm`" in text and "| accuracy | " in text
    merged = ummrm.merge(trainer.model)
    assert ummrm.reward_normalization(merged) == normalization


@pytest.mark.parametrize("model_type", ["opt", *map(in_full, ("falcon", "deberta-v2", "gpt2"))])
def test_one_step_in_families_that_pass_arguments_differently(model_type, tmp_path):
    """With checkpointing, whose recomputation must see the same groups; SGD, so that what gets a gradient moves."""
    config = KINDS["ffn" if model_type == "deberta-v2" else "linear"]
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "center_rewards_coefficient": 0.1}
    options |= {"dataset": make_dataset(4)}
    before = dict(make_moe(config=config, model_type=model_type).named_parameters())
    trained = []
    for checkpointing in (False, True):
        model = make_moe(config=config, model_type=model_type)
        trained.append(trainer_of(tmp_path, model=model, gradient_checkpointing=checkpointing, **options))
        trained[-1].train()  # before another one takes random numbers: families have dropout
    plain, checkpointed = trained
    assert logged(checkpointed, "loss") == logged(plain, "loss")
    for (name, a), b in zip(plain.model.named_parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)
        bias_of_keys = name.endswith(("key_proj.bias", "k_proj.bias", "k_proj.expert_bias"))
        moved = (a - before[name]).abs()
        if "experts." in name or "expert_" in name:
            assert bias_of_keys or (moved.flatten(1).amax(1) > 0).all(), name
        else:
            assert bias_of_keys or moved.max() > 0, name


def test_trls_own_trainer_says_what_is_missing(tmp_path):
    trainer = trainer_of(tmp_path, trainer=RewardTrainer, max_steps=1)
    with pytest.raises(ValueError, match=r"`groups` must say in training.*UmmRewardTrainer does"):
        trainer.train()


def test_a_mixture_is_refused_where_it_can_not_be_trained(tmp_path):
    for model, message in (
        (tiny_model("llama"), "upcycle it first"),
        (ummrm.prepare_merge(make_moe(config=SEQUENCE)), "it is in its merge phase: use UmmMergeTrainer"),
    ):
        with pytest.raises(TypeError, match=message):
            make_trainer(tmp_path, model)
    for config in (SEQUENCE, UpcycleConfig()):
        language = ummrm.upcycle(tiny_model("llama", "ForCausalLM", num_labels=1), config)
        with pytest.raises(
            TypeError, match="`model` must have a reward head, got a UmmLlamaForCausalLM.*new_head=True"
        ):
            make_trainer(tmp_path, language)
        with pytest.raises(TypeError, match="`model` must have a reward head"):
            UmmMergeTrainer(language, train_dataset=make_dataset(4), processing_class=make_tokenizer())
