"""UmmRewardTrainer: TRL's trainer with auxiliary losses, on every data format, accumulated, resumed, evaluated."""

import subprocess
import sys
import warnings

import pytest
import torch
from checkout import SUPPORT
from datasets import IterableDataset
from tiny_models import tiny_model
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardTrainer
from trl_child import train
from trl_inputs import CONFIG, make_dataset, make_moe, make_pairs, make_tokenizer, settings

import ummrm
from ummrm import UmmRewardTrainer, UpcycleConfig, auxiliary_loss, preference_loss

NOISY = UpcycleConfig(**{**CONFIG.to_dict(), "router_noise": "learned"})


def make_trainer(folder, model=None, dataset=None, trainer=UmmRewardTrainer, eval_dataset=None, **overrides):
    options = {k: overrides.pop(k) for k in ("log_layers", "callbacks", "peft_config") if k in overrides}
    return trainer(
        make_moe() if model is None else model,
        settings(folder, **overrides),
        train_dataset=make_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        **options,
    )


def batch_of(dataset):
    """The padded batch of all prepared pairs, chosen answers first, and their margins."""
    rows = [torch.tensor(ids) for key in ("chosen_ids", "rejected_ids") for ids in dataset[key]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


FORMATS = ["implicit", "explicit", "conversational", "conversational implicit", "tokenised", "margin"]


@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_data_format_trains_on_the_loss_of_its_definition(kind, center, tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset(4, kind=kind), max_steps=1, center_rewards_coefficient=center)
    model, data = make_moe().train(), trainer.train_dataset
    chosen, rejected = model(**batch_of(data)).logits.squeeze(-1).chunk(2)
    margin = torch.tensor(data["margin"]) if kind == "margin" else None
    preference = preference_loss(chosen, rejected, margin)
    if center is not None:
        preference = preference + center * (chosen + rejected).square().mean()
    auxiliary = auxiliary_loss(model)
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert entry["loss"] == pytest.approx((preference + auxiliary).item(), rel=1e-5)
    assert entry["preference_loss"] == pytest.approx(preference.item(), rel=1e-5)
    assert entry["aux_loss"] == pytest.approx(auxiliary.item(), rel=1e-5)
    assert entry["std_reward"] == pytest.approx(torch.cat([chosen, rejected]).std(correction=0).item(), rel=1e-4)


def test_formats_that_say_the_same_give_the_same_tokens(tmp_path):
    by_kind = {kind: make_trainer(tmp_path, dataset=make_dataset(4, kind=kind)).train_dataset for kind in FORMATS}
    for one, other in (("implicit", "explicit"), ("conversational", "conversational implicit")):
        assert by_kind[one]["chosen_ids"] == by_kind[other]["chosen_ids"]
    assert [ids[:-1] for ids in by_kind["implicit"]["rejected_ids"]] == by_kind["tokenised"]["rejected_ids"][:]


def test_routing_is_logged_in_all_and_by_layer(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset(4), max_steps=1)
    model = make_moe().train()
    with ummrm.record_routing_statistics(model) as statistics:
        model(**batch_of(trainer.train_dataset))
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    for i, name in enumerate(statistics.fractions):
        shares = statistics.fractions[name]
        entropy = -(shares * shares.log()).nansum() / torch.tensor(4.0).log()
        assert entry[f"max_expert_share/layer_{i}"] == pytest.approx(shares.max().item(), rel=1e-4)
        assert entry[f"expert_entropy/layer_{i}"] == pytest.approx(entropy.item(), rel=1e-4)
        assert entry[f"shared_weight/layer_{i}"] == pytest.approx(statistics.shared_weight[name], rel=1e-4)
    for key in ("aux_loss", "load_balancing_loss", "z_loss", "shared_weight", "max_expert_share", "expert_entropy"):
        layers = [entry[f"{key}/layer_{i}"] for i in range(2)]
        assert entry[key] == pytest.approx(sum(layers) / 2, rel=1e-5) and layers[0] != layers[1]
    weighted = 0.1 * entry["load_balancing_loss"] + 0.1 * entry["z_loss"]
    assert entry["aux_loss"] == pytest.approx(weighted, rel=1e-5)
    quiet = make_trainer(tmp_path, dataset=make_dataset(4), max_steps=1, log_layers=False)
    quiet.train()
    assert logged(quiet, "aux_loss") and not any("/" in key for e in quiet.state.log_history for key in e)


def after_one_step(folder, config, dataset, **batching):
    trainer = make_trainer(
        folder, make_moe(config=config), dataset, max_steps=1, optim="sgd", max_grad_norm=0, **batching
    )
    trainer.train()
    return trainer


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    """With answers of unequal lengths: a mean over tokens must count each batch by its tokens."""
    config = UpcycleConfig(**{**CONFIG.to_dict(), "balancing_loss_coef": 0.0, "z_loss_coef": 1.0})
    data = make_dataset(8, longest=30)
    whole = after_one_step(tmp_path, config, data, per_device_train_batch_size=8)
    parts = after_one_step(tmp_path, config, data, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    before = make_moe(config=config)
    for (name, a), b, start in zip(
        whole.model.named_parameters(), parts.model.parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)
        assert (a - start).abs().max() > 1e-5, name
    for key in ("loss", "aux_loss", "z_loss", "z_loss/layer_1", "shared_weight", "max_expert_share"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), rel=1e-4), key


def test_the_accumulated_balancing_loss_is_the_mean_of_its_batches(tmp_path):
    """Not their sum. A product of two means: equal to the unaccumulated one where the batches route alike."""
    config = UpcycleConfig(**{**CONFIG.to_dict(), "balancing_loss_coef": 1.0, "z_loss_coef": 0.0})
    data = make_dataset(1).select([0] * 8)
    whole = after_one_step(tmp_path, config, data, per_device_train_batch_size=8)
    parts = after_one_step(tmp_path, config, data, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)


@pytest.mark.full
def test_two_processes_that_accumulate_equal_one_batch(tmp_path):
    script = SUPPORT / "trl_child.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    theirs, log = torch.load(tmp_path / "out.pt", weights_only=False)
    ours, alone, _ = train(tmp_path / "one", per_device_train_batch_size=16)
    for name, parameter in ours.items():
        torch.testing.assert_close(theirs[name], parameter, rtol=1e-4, atol=1e-6, msg=name)
    for key in ("aux_loss", "z_loss/layer_0", "shared_weight/layer_1", "expert_entropy", "preference_loss"):
        assert log[key] == pytest.approx(alone[key], rel=1e-4), key
    for key in ("std_reward", "eval_std_reward", "eval_loss", "eval_z_loss", "eval_mean_reward"):
        assert log[key] == pytest.approx(alone[key], rel=1e-4), key
    a, b = log["normalization"], alone["normalization"]
    assert (a.mean, a.std) == pytest.approx((b.mean, b.std), rel=1e-4)


@pytest.mark.full
def test_a_compiled_model_trains_alike(tmp_path):
    plain = make_trainer(tmp_path)
    plain.train()
    compiled = make_trainer(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)
    assert logged(compiled, "aux_loss") == pytest.approx(logged(plain, "aux_loss"), rel=1e-4)


@pytest.mark.parametrize("mode", ["checkpointing", "selective checkpointing", "bf16"])
def test_memory_saving_modes_give_the_same_training(mode, tmp_path):
    plain = make_trainer(tmp_path, make_moe(config=NOISY))
    plain.train()
    kept = []

    def policy(context, op, *args, **kwargs):
        keep = op in (torch.ops.ummrm.moe_ffn_forward.default, torch.ops.ummrm.route.default)
        kept.append(op) if keep else None
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"bf16": True} if mode == "bf16" else {"gradient_checkpointing": True}
    if mode == "selective checkpointing":
        options["gradient_checkpointing_kwargs"] = {
            "use_reentrant": False,
            "context_fn": lambda: create_selective_checkpoint_contexts(policy),
        }
    saving = make_trainer(tmp_path, make_moe(config=NOISY), **options)
    saving.train()
    assert saving.model.is_gradient_checkpointing == ("checkpointing" in mode)
    assert bool(kept) == (mode == "selective checkpointing")
    rel = 3e-2 if mode == "bf16" else 1e-5
    assert logged(saving, "loss") == pytest.approx(logged(plain, "loss"), rel=rel)
    if mode == "bf16":
        assert logged(saving, "loss") != logged(plain, "loss")
        assert all(p.dtype == torch.float32 for p in saving.model.parameters())


def test_every_parameter_moves_and_frozen_ones_stay(tmp_path):
    model = make_moe(config=NOISY)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" not in name and "shared_experts" not in name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_resuming_equals_an_uninterrupted_run(tmp_path):
    whole = make_trainer(tmp_path / "a", make_moe(config=NOISY), save_strategy="steps", save_steps=2, max_steps=5)
    whole.train()
    again = make_trainer(tmp_path / "b", make_moe(1, config=NOISY), save_strategy="steps", save_steps=2, max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for key in ("loss", "learning_rate", "aux_loss", "expert_entropy/layer_0", "accuracy"):
        assert logged(again, key) == logged(whole, key), key
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b" / "checkpoint-5")
    for (name, a), b in zip(whole.model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    other = make_trainer(tmp_path / "b", make_moe(config=NOISY))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be of the model .* has umm="):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    dense = make_trainer(tmp_path / "c", tiny_model("llama"), trainer=RewardTrainer, max_steps=1, save_steps=1)
    dense.args.save_strategy = "steps"
    dense.train()
    dense.save_model(tmp_path / "c" / "dense")
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be of the model"):
        other._load_from_checkpoint(str(tmp_path / "c" / "dense"))


class Collect(TrainerCallback):
    """What the callbacks of transformers are told after each evaluation."""

    def __init__(self):
        self.metrics = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(dict(metrics))


def test_every_evaluation_set_has_metrics_of_its_own(tmp_path):
    sets = {"first": make_dataset(6, 1), "second": make_dataset(7, 2)}
    collect = Collect()
    trainer = make_trainer(
        tmp_path,
        eval_dataset=sets,
        callbacks=[collect],
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_second_accuracy",
        greater_is_better=True,
    )
    trainer.train()
    assert len(collect.metrics) == 4 and trainer.state.best_metric is not None
    final = trainer.evaluate()
    model = trainer.model.eval()
    for name in sets:
        with torch.no_grad():
            rewards = model(**batch_of(trainer.eval_dataset[name])).logits.flatten()
        chosen, rejected = rewards.chunk(2)
        expected = {
            "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean(),
            "mean_reward": rewards.mean(),
            "std_reward": rewards.std(correction=0),
            "loss": preference_loss(chosen, rejected),
            "aux_loss": auxiliary_loss(model),
        }
        for key, value in expected.items():
            assert final[f"eval_{name}_{key}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), (name, key)
        assert (
            collect.metrics[-1 if name == "second" else -2][f"eval_{name}_accuracy"] == final[f"eval_{name}_accuracy"]
        )
    assert "eval_accuracy" not in final
    assert trainer.evaluate(make_dataset(3, 4))["eval_accuracy"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


def test_metrics_are_means_over_pairs_whatever_the_batches(tmp_path):
    data = make_dataset(17, 3)
    found = [
        make_trainer(tmp_path, eval_dataset=data, per_device_eval_batch_size=size).evaluate() for size in (8, 17, 1)
    ]
    for key in ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "std_reward"):
        assert found[0][f"eval_{key}"] == pytest.approx(found[1][f"eval_{key}"], rel=1e-5), key
        assert found[2][f"eval_{key}"] == pytest.approx(found[1][f"eval_{key}"], rel=1e-5), key
    assert 17 * found[0]["eval_accuracy"] == pytest.approx(round(17 * found[0]["eval_accuracy"]), abs=1e-9)


def test_a_prediction_counts_in_no_later_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_dataset(5, 1), max_steps=1)
    expected = trainer.evaluate()
    trainer.predict(make_trainer(tmp_path, dataset=make_dataset(9, 2)).train_dataset)
    again = trainer.evaluate()
    for key in ("eval_std_reward", "eval_z_loss", "eval_accuracy", "eval_max_expert_share/layer_0"):
        assert again[key] == expected[key], key


def too_long(pairs, limit):
    return sum(max(len(p["chosen"].split()), len(p["rejected"].split())) + 4 > limit for p in pairs)


def test_over_long_pairs_are_counted_and_warned_about(tmp_path):
    limit = 12  # prompt 3, answer, end of sequence 1
    expected, of_eval = too_long(make_pairs(16), limit), too_long(make_pairs(9, 3), limit)
    assert 0 < expected < 16 and 0 < of_eval < 9
    with pytest.warns(UserWarning) as caught:
        trainer = make_trainer(tmp_path, max_length=limit, eval_dataset=make_dataset(9, 3))
    said = [str(w.message) for w in caught if "max_length" in str(w.message)]
    assert f"{expected} of 16 pairs ({expected / 16:.1%}) of the train set are longer than max_length=12" in said[0]
    assert "Raise `max_length` in RewardConfig" in said[0] and f"{of_eval} of 9 pairs" in said[1] and len(said) == 2
    assert trainer.long_pairs["train"].long == expected and len(trainer.train_dataset) == 16 - expected
    plain = make_trainer(tmp_path, max_length=limit, trainer=RewardTrainer)
    assert trainer.train_dataset["chosen_ids"] == plain.train_dataset["chosen_ids"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_length.*")
        trainer.evaluate()
        trainer.evaluate({"again": trainer.train_dataset})
        make_trainer(tmp_path, max_length=None)
        make_trainer(tmp_path)


def test_tokenised_pairs_are_not_filtered_and_that_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"of 16 pairs .* stay in: the set came tokenised"):
        trainer = make_trainer(tmp_path, dataset=make_dataset(16, kind="tokenised"), max_length=11)
    assert len(trainer.train_dataset) == 16 and trainer.long_pairs["train"].kept


def test_a_stream_warns_at_its_first_over_long_pair_and_logs_how_many(tmp_path):
    rows = list(make_dataset(16))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.warns(UserWarning, match="streamed train set has pairs longer than max_length=12"):
        trainer = make_trainer(tmp_path, dataset=stream, max_length=12, max_steps=2)
        trainer.train()
    assert logged(trainer, "long_pairs/train")[-1] >= 1


def test_no_pair_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="all 16 pairs of the train set are longer than 2 tokens. Raise `max_length`"):
        make_trainer(tmp_path, max_length=2)


def test_rewards_are_normalised_over_a_data_set_and_forgotten_when_training_goes_on(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, per_device_eval_batch_size=5)
    normalization = trainer.normalize_rewards(make_dataset(7, 5, kind="margin"))
    data = make_trainer(tmp_path, dataset=make_dataset(7, 5)).train_dataset
    expected = ummrm.measure_rewards(trainer.model, [batch_of(data)])
    assert (normalization.mean, normalization.std) == pytest.approx((expected.mean, expected.std), rel=1e-4)
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert ummrm.reward_normalization(loaded) == normalization
    with pytest.warns(UserWarning, match="describes it before this training and is dropped"):
        trainer.train()
    assert ummrm.reward_normalization(trainer.model) is None
    trainer.normalize_rewards()
    assert ummrm.reward_normalization(trainer.model) != normalization


def test_the_card_names_the_base_model_and_the_results(tmp_path):
    model = make_moe()
    model.config.umm_base_model = "someone/dense-rm"
    trainer = make_trainer(tmp_path / "run", model, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "2512.00724" in text and "`someone/dense-rm`" in text and "huggingface.co/None" not in text
    assert "| pairs | 16 |" in text and "| accuracy | " in text and "| aux_loss | " in text


def test_a_model_that_it_cannot_train_is_refused(tmp_path):
    for model, message in (
        (tiny_model("llama"), "got a LlamaForSequenceClassification; upcycle it first"),
        (ummrm.prepare_merge(make_moe()), "it is in its merge phase: use UmmMergeTrainer"),
    ):
        with pytest.raises(TypeError, match=message):
            make_trainer(tmp_path, model)


def test_without_trl_the_trainers_say_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("ummrm.trainer")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(ummrm, "trainer")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ModuleNotFoundError, match=r"ummrm.UmmRewardTrainer needs trl, .* pip install 'ummrm\[trl\]'"):
        ummrm.UmmRewardTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ummrm.Nothing  # noqa: B018
