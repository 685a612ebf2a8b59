"""UmmMergeTrainer: learns alpha (and lambda) alone, logs it, resumes, refuses nonsense, and saves a stock model."""

import warnings

import pytest
import torch
from tiny_models import padded_batch, tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig
from trl_inputs import make_dataset, make_moe, make_tokenizer, settings

import ummrm
from ummrm import MergeConfig, UmmMergeConfig, UmmMergeTrainer, UmmRewardTrainer

LEARNED = MergeConfig(learn_shared_share=True, alpha_per="projection")


def make_trainer(folder, model=None, dataset=None, merge_config=None, **overrides):
    options = {
        k: overrides.pop(k) for k in ("statistics", "statistics_batches", "peft_config", "log_layers") if k in overrides
    }
    return UmmMergeTrainer(
        make_moe() if model is None else model,
        settings(folder, **{"learning_rate": 0.2, **overrides}),
        train_dataset=make_dataset() if dataset is None else dataset,
        processing_class=make_tokenizer(),
        merge_config=merge_config,
        **options,
    )


def entries(trainer):
    return [e for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("merge_config", [None, LEARNED], ids=["alpha", "alpha by projection and lambda"])
def test_alpha_moves_and_nothing_else(merge_config, tmp_path):
    trainer = make_trainer(tmp_path, merge_config=merge_config, weight_decay=0.5, max_steps=6)
    learned = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(learned) == (2 if merge_config is None else 3)
    before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in learned), name
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups if group["params"]] == [0.0]


def test_learning_lowers_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset(8), per_device_train_batch_size=8, max_steps=25)
    trainer.train()
    losses = [e["loss"] for e in entries(trainer)]
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("merge_config", [MergeConfig(shared_share=0.25), LEARNED], ids=["layer", "projection"])
def test_alpha_and_lambda_are_logged(merge_config, tmp_path):
    trainer = make_trainer(tmp_path, merge_config=merge_config)
    trainer.train()
    entry = entries(trainer)[-1]
    for i, (name, coefficients) in enumerate(ummrm.merge_coefficients(trainer.model).items()):
        alpha = trainer.model.get_submodule(name).alpha
        rows = {"": alpha} if alpha.dim() == 1 else dict(zip(("gate/", "up/", "down/"), alpha, strict=True))
        for projection, row in rows.items():
            got = [entry[f"alpha/layer_{i}/{projection}expert_{e}"] for e in range(4)]
            assert got == pytest.approx(row.tolist(), rel=1e-5)
        assert entry["lambda"] == pytest.approx(coefficients[0, 0].item(), rel=1e-5)
        shares = coefficients[:, 1:] / coefficients[:, 1:].sum(-1, keepdim=True)
        assert entry[f"max_merge_share/layer_{i}"] == pytest.approx(shares.max().item(), rel=1e-5)
        entropy = -(shares * shares.log()).sum(-1).mean() / torch.tensor(4.0).log()
        assert entry[f"merge_entropy/layer_{i}"] == pytest.approx(entropy.item(), rel=1e-5)
    assert (entry["lambda"] == 0.25) == (merge_config is not LEARNED)
    assert 0 < entry["merge_entropy"] < 1
    quiet = make_trainer(tmp_path, log_layers=False, max_steps=1)
    quiet.train()
    assert "lambda" in entries(quiet)[0] and not any("/" in key for key in entries(quiet)[0])


def test_alpha_starts_from_routing_measured_on_the_training_set(tmp_path):
    config = MergeConfig(alpha_init="routing")
    trainer = make_trainer(tmp_path, merge_config=config, statistics_batches=2)  # 2 batches of 4 pairs
    moe, data = make_moe(), trainer.train_dataset.select(range(8))
    with ummrm.record_routing_statistics(moe) as statistics:
        for ids in [*data["chosen_ids"], *data["rejected_ids"]]:
            moe(input_ids=torch.tensor([ids]))
    given = make_trainer(tmp_path, merge_config=config, statistics=statistics)
    for (name, measured), other in zip(
        ummrm.merge_coefficients(trainer.model).items(), ummrm.merge_coefficients(given.model).values(), strict=True
    ):
        torch.testing.assert_close(measured, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(measured[0, 1:], 0.5 * statistics.gate_shares[name].float(), rtol=1e-3, atol=1e-4)
        assert (measured[0, 1:] - 0.125).abs().max() > 1e-3


@pytest.mark.parametrize("start", ["model", "path", "checkpoint as the model"])
def test_resuming_equals_an_uninterrupted_run(start, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "merge_config": LEARNED}
    whole = make_trainer(tmp_path / "a", **saving)
    whole.train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    model = make_moe()
    if start != "model":
        model.save_pretrained(tmp_path / "moe")
        model = str(tmp_path / "moe")
    if start == "checkpoint as the model":
        model, saving["merge_config"] = checkpoint, None
    again = make_trainer(tmp_path / "b", model, **saving)
    again.train(resume_from_checkpoint=checkpoint)
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for key in ("loss", "lambda", "alpha/layer_1/up/expert_3", "learning_rate"):
        assert [e[key] for e in entries(again)] == [e[key] for e in entries(whole)], key


def test_checkpointing_autocast_and_accumulation(tmp_path):
    plain = make_trainer(tmp_path, dataset=make_dataset(8), per_device_train_batch_size=8, max_steps=2)
    plain.train()
    modes = [
        ({"gradient_checkpointing": True, "per_device_train_batch_size": 8}, 1e-5),
        ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}, 1e-4),
        ({"bf16": True, "per_device_train_batch_size": 8}, 3e-2),
    ]
    for mode, rel in modes:
        other = make_trainer(tmp_path, dataset=make_dataset(8), max_steps=2, **mode)
        other.train()
        assert [e["loss"] for e in entries(other)] == pytest.approx([e["loss"] for e in entries(plain)], rel=rel), mode
        for name, parameter in other.model.named_parameters():
            if name.endswith("alpha"):
                assert parameter.dtype == torch.float32 and parameter.abs().max() > 1e-3


def test_the_whole_way_ends_in_a_stock_folder_with_tokenizer_and_card(tmp_path):
    moe = make_moe()
    moe.config.umm_base_model = "someone/dense-rm"
    trained = UmmRewardTrainer(moe, settings(tmp_path), train_dataset=make_dataset(), processing_class=make_tokenizer())
    trained.train()
    trainer = make_trainer(tmp_path, trained.model, max_length=12)
    trainer.train()
    trainer.normalize_rewards()
    trainer.save_merged(str(tmp_path / "merged"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert type(loaded).__module__.startswith("transformers.") and loaded.config.pad_token_id == 0
    batch = padded_batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
    assert ummrm.reward_normalization(loaded) == ummrm.reward_normalization(trainer.model)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w1 w2")["input_ids"] == [7, 8]
    assert (
        "TokenizersBackend" not in (tmp_path / "merged" / "tokenizer_config.json").read_text()
    )  # transformers 4 has none
    card = (tmp_path / "merged" / "README.md").read_text()
    dropped = trainer.long_pairs["train"].long
    assert "base_model: someone/dense-rm" in card and dropped > 0
    assert (
        f"| over-long pairs, train | {dropped} of 16 |" in card and "| steps | 4 |" in card and "| accuracy |" in card
    )


def largest_alpha(model):
    return max(p.abs().max().item() for n, p in model.named_parameters() if n.endswith("alpha"))


def test_a_learning_rate_that_nobody_set_is_the_merge_phases_own(tmp_path):
    """TRL's, 1e-4, leaves |alpha| at 0.001 after 20 steps: a uniform merge, whatever the data says."""
    run = {"max_steps": 20, "per_device_train_batch_size": 8}
    args = settings(tmp_path, learning_rate=RewardConfig(str(tmp_path), use_cpu=True).learning_rate, **run)
    given = {"train_dataset": make_dataset(8), "processing_class": make_tokenizer()}
    with pytest.warns(UserWarning, match=r"default learning rate, 0.0001, .* own, 0.05, .*UmmMergeConfig\(lear"):
        trainer = UmmMergeTrainer(make_moe(), args, **given)
    assert args.learning_rate == 1e-4 and type(trainer.args) is RewardConfig
    trainer.train()
    assert largest_alpha(trainer.model) > 0.1 and entries(trainer)[0]["learning_rate"] == 0.05
    assert entries(trainer)[-1]["loss"] < entries(trainer)[0]["loss"]
    assert "| learning rate | 0.05 |" in trainer.training_notes()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learning rate")
        insisting = settings(tmp_path, UmmMergeConfig, learning_rate=1e-4, **run)
        slow = UmmMergeTrainer(make_moe(), insisting, **given)
        slow.train()
        assert 0 < largest_alpha(slow.model) < 0.01
        assert UmmMergeConfig(str(tmp_path), use_cpu=True).learning_rate == 0.05
        moe = ummrm.prepare_merge(make_moe())  # with an optimizer of the user's own the rate is its business
        optimizer = torch.optim.SGD([p for p in moe.parameters() if p.requires_grad], lr=3.0)
        UmmMergeTrainer(moe, args, **given, optimizers=(optimizer, None))


def test_without_settings_it_learns_at_a_rate_that_moves_alpha(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moe = make_moe()
    moe.config._name_or_path = "some/where/tiny"
    made = []

    class Stop(Exception):
        pass

    def stop(self, model, args, *rest, **kwargs):
        made.append(args)
        raise Stop

    monkeypatch.setattr("ummrm.trainer.base.RewardTrainer.__init__", stop)
    with pytest.raises(Stop):
        UmmMergeTrainer(moe, train_dataset=make_dataset())
    assert made[0].learning_rate == 0.05 and made[0].output_dir == "tiny-Merge"


def merging_model():
    return ummrm.prepare_merge(make_moe(), MergeConfig(shared_share=0.75))


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: tiny_model("llama"), {}, TypeError, "got a LlamaForSequenceClassification; upcycle it first"),
        (make_moe, {"merge_config": {"shared_share": 1}}, TypeError, "`merge_config` must be a MergeConfig, got dict"),
        (make_moe, {"peft_config": object()}, ValueError, "`peft_config` must be None: the merge phase trains alpha"),
        (
            make_moe,
            {"statistics": object()},
            ValueError,
            "`statistics` must be None unless merge_config has alpha_init",
        ),
        (
            make_moe,
            {"merge_config": MergeConfig(alpha_init="routing"), "statistics_batches": 0},
            ValueError,
            "`statistics_batches` must be an integer of at least 1, got 0",
        ),
        (
            merging_model,
            {"merge_config": MergeConfig(shared_share=0.5)},
            ValueError,
            "`merge_config` must be that of the model, .*shared_share=0.75",
        ),
    ],
)
def test_nonsense_is_refused(make, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, make(), **options)


def test_an_optimizer_of_the_frozen_parameters_is_refused(tmp_path):
    moe = make_moe()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizers` must not be given .*prepare_merge"):
        UmmMergeTrainer(
            moe,
            settings(tmp_path),
            train_dataset=make_dataset(),
            processing_class=make_tokenizer(),
            optimizers=(optimizer, None),
        )


def test_a_model_in_its_merge_phase_goes_on_with_the_same_configuration(tmp_path):
    trainer = make_trainer(tmp_path, merging_model(), merge_config=MergeConfig(shared_share=0.75), max_steps=1)
    trainer.train()
    assert entries(trainer)[0]["lambda"] == 0.75
    set_by_hand = merging_model()
    set_by_hand.get_buffer("model.umm_merge_share.share").fill_(0.25)
    assert [e["lambda"] for e in entries(make_trained(tmp_path, set_by_hand))] == [0.25]
    with pytest.raises(ValueError, match="`merge_config` must be that of the model, .*shared_share=0.25"):
        make_trainer(tmp_path, set_by_hand, merge_config=MergeConfig(shared_share=0.75))


def make_trained(folder, model):
    trainer = make_trainer(folder, model, max_steps=1)
    trainer.train()
    return trainer


def test_a_checkpoint_of_the_mixture_phase_is_refused(tmp_path):
    trained = UmmRewardTrainer(
        make_moe(),
        settings(tmp_path / "a", max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )
    trained.train()
    with pytest.raises(ValueError, match="has umm_phase='mixture' where the model has 'merging'"):
        make_trainer(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
