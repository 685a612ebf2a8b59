"""Small models side by side against stock ones: forward, training, mixtures, merging; seeds don't touch each other."""

import dataclasses

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer, get_linear_schedule_with_warmup

import ummrm
from lab.backbone.llama import LlamaShape
from lab.backbone.mixture import TokenMixture, learn_alpha, merged, token_upcycled, train_token
from lab.backbone.optimiser import Optimisation
from lab.backbone.regimes import PretrainingConfig, language_block
from lab.backbone.replicas import member, shared_name
from lab.backbone.training import (
    Sequencing,
    by_group,
    distil,
    merged_by_mean,
    order,
    pair_losses,
    train_dense,
    train_sequence,
    upcycled,
)
from lab.tasks.language import LanguageTaskConfig
from ummrm.nn.losses import preference_loss

TASK = LanguageTaskConfig(train_pairs=48, test_pairs=8, prompts=4, samples=8, corpus=64, unlabelled=32)
SHAPE = LlamaShape(hidden_size=16, intermediate_size=24)
SETTINGS = Optimisation(warmup_steps=2, weight_decay=0.1)
RATE, STEPS, BATCH = 5e-3, 4, 8


def block_of(seeds):
    return language_block(TASK, SHAPE, PretrainingConfig(steps=3, batch=8), seeds)


@pytest.fixture(scope="module")
def block():
    return block_of((3, 4))


def inputs(features, replica):
    tokens, lengths = features["tokens"][replica], features["lengths"][replica]
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return {"input_ids": tokens, "attention_mask": mask.long()}


def batch_at(block, step, replica, label=0):
    """The batch that a replica sees at a step, as a stock model reads it."""
    index = torch.stack([order(seed, label, len(block.train), STEPS, BATCH)[step] for seed in block.seeds])
    return inputs(block.train.take(torch.arange(len(block.seeds)), index), replica)


def test_a_replica_is_a_stock_model(block):
    features = block.policy.take(torch.arange(2), torch.arange(32).expand(2, -1))
    found = block.network.rewards(block.start, features)
    for replica in range(2):
        model = block.network.to_stock(block.start, replica)
        assert type(model) is LlamaForSequenceClassification
        with torch.no_grad():
            stock = model(**inputs(features, replica)).logits[:, 0]
        torch.testing.assert_close(found[replica], stock, atol=2e-6, rtol=1e-5)
        back = block.network.from_stock(model)
        assert back.keys() == block.start.keys()
        assert all(torch.equal(value[0], block.start[name][replica]) for name, value in back.items())


def test_pretraining_minimises_the_stock_language_models_loss(block):
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    language = block.network.initial(generators)
    features = block.unlabelled.take(torch.arange(2), torch.arange(12).expand(2, -1))
    found = block.network.next_token_loss(language, features)
    model = block.network.to_stock(language, 1)
    assert type(model) is LlamaForCausalLM
    given = inputs(features, 1)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[:, :2] = -100  # the prompt
    with torch.no_grad():
        stock = model(**given, labels=labels).loss
    torch.testing.assert_close(found[1], stock, atol=1e-6, rtol=1e-5)


def test_dense_training_is_that_of_transformers_trainer(block):
    trained = train_dense(block, STEPS, BATCH, RATE, SETTINGS)
    model = block.network.to_stock(block.start, 1).train()
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": SETTINGS.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimiser, SETTINGS.warmup_steps, STEPS)
    for step in range(STEPS):
        rewards = model(**batch_at(block, step, 1)).logits[:, 0].view(-1, 2)
        preference_loss(rewards[:, 0], rewards[:, 1]).backward()
        clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    stock = block.network.from_stock(model)
    assert any(not torch.equal(stock[name][0], block.start[name][1]) for name in stock)
    for name, value in stock.items():
        torch.testing.assert_close(trained[name][1], value[0], atol=3e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("train", ["dense", "sequence", "token"])
def test_a_seeds_result_does_not_depend_on_the_others(block, train):
    def run(of):
        if train == "dense":
            return train_dense(of, STEPS, BATCH, RATE, SETTINGS)
        if train == "sequence":
            return train_sequence(of, STEPS, BATCH, RATE, SETTINGS, Sequencing(experts_in="linear"))
        config = ummrm.UpcycleConfig(router="mlp", router_noise="learned")
        return train_token(of, STEPS, BATCH, RATE, SETTINGS, config)

    both, alone, repeated = run(block), run(block_of((4,))), run(block)
    for name, value in both.items():
        assert torch.equal(value, repeated[name]), name
        assert torch.equal(value[1], alone[name][0]), name


def test_runs_may_start_from_heads_of_their_own(block):
    def run(number, own_head, steps=1, rate=0.0):
        return train_dense(block, steps, BATCH, rate, SETTINGS, run=number, own_head=own_head)

    first, common, own = run(0, True), run(1, False), run(1, True)
    for name, value in block.start.items():
        assert torch.equal(first[name], value) and torch.equal(common[name], value), name
        assert torch.equal(own[name], value) == (name != "score"), name
    spread = own["score"].std(2), block.start["score"].std(2)
    assert torch.allclose(*spread, rtol=0.5) and not torch.equal(own["score"], run(2, True)["score"])


# ---- by sequence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sequencing",
    [Sequencing(), Sequencing(experts_in="linear"), Sequencing(experts_in="all"), Sequencing(shared_weight=0.25)],
    ids=str,
)
def test_members_by_sequence_are_a_loop_over_members(block, sequencing):
    """Each expert's pairs go through the dense model that it is of, and the loss is the whole batch's mean."""
    trained = train_sequence(block, 3, BATCH, RATE, SETTINGS, sequencing)
    parameters = {name: value.clone().requires_grad_() for name, value in trained.items()}
    each = torch.stack([by_group(seed, 3, BATCH, 4) for seed in block.seeds])
    features = block.train.take(torch.arange(2), each)
    share, names = sequencing.shared_weight, block.network.expert_names(sequencing.experts_in)
    together = block.network.rewards(parameters, features, share)
    loss = pair_losses(together)
    (gradient,) = torch.autograd.grad(loss.sum(), [parameters["0.up"]])

    parts = []
    for e in range(4):
        one = {name: value[:, 2 * e * 2 : 2 * (e + 1) * 2] for name, value in features.items()}
        parts.append(block.network.rewards(member(parameters, names, e), one, share))
    looped = torch.cat(parts, 1)
    torch.testing.assert_close(together, looped, atol=1e-6, rtol=1e-5)
    (other,) = torch.autograd.grad(pair_losses(looped).sum(), [parameters["0.up"]])
    torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(trained["0.up"][:, 0], trained["0.up"][:, 1])


@pytest.mark.parametrize("experts_in", ["ffn", "linear"])
def test_by_sequence_is_the_products_assignment(block, experts_in):
    """THE PLACE where the laboratory's assignment by sequence is held to the product's: rewards, gradients, merging."""
    sequencing = Sequencing(experts_in=experts_in)
    trained = train_sequence(block, 3, BATCH, RATE, SETTINGS, sequencing)
    config = ummrm.UpcycleConfig(assignment="sequence", experts_in=experts_in)
    model = ummrm.upcycle(block.network.to_stock(block.start, 1), config).train()
    names = block.network.expert_names(experts_in)
    members = [block.network.to_stock(member(trained, names, e), 1).state_dict() for e in range(4)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(product_tensor(name, members))
    each = torch.stack([by_group(seed, 3, BATCH, 4) for seed in block.seeds])
    features = block.train.take(torch.arange(2), each)
    groups = torch.arange(4).repeat_interleave(4)
    rewards = model(**inputs(features, 1), groups=groups).logits[:, 0].view(-1, 2)
    loss = preference_loss(rewards[:, 0], rewards[:, 1])
    loss.backward()

    parameters = {name: value.clone().requires_grad_() for name, value in trained.items()}
    ours = pair_losses(block.network.rewards(parameters, features))
    ours.sum().backward()
    torch.testing.assert_close(ours[1], loss, atol=1e-6, rtol=1e-5)
    found = dict(model.named_parameters())
    for name, of_product in (
        ("0.down", "model.layers.0.mlp.experts.down_proj"),
        ("embed", "model.embed_tokens.weight"),
    ):
        torch.testing.assert_close(parameters[name].grad[1], found[of_product].grad, atol=1e-6, rtol=1e-4)

    dense = ummrm.merge(ummrm.prepare_merge(model.eval()))
    mean = block.network.from_stock(dense)
    for name, value in merged_by_mean(block, trained, sequencing).items():
        torch.testing.assert_close(value[1], mean[name][0], atol=1e-6, rtol=1e-5, msg=name)


def product_tensor(name, members):
    """A parameter of the product's mixture from the members' stock tensors."""
    if name.endswith(".expert_weight"):
        return torch.stack([one[name.replace("expert_weight", "weight")] for one in members])
    if "mlp.experts" not in name:
        return members[0][name]
    at = name.split("experts")[0]
    parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
    return torch.stack([torch.cat([one[f"{at}{part}.weight"] for part in parts]) for one in members])


def test_a_shared_expert_counts_by_its_weight_in_the_merge(block):
    sequencing = Sequencing(shared_weight=0.25)
    parameters = upcycled(block, sequencing)
    parameters = {n: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for n, v in parameters.items()}
    found = merged_by_mean(block, parameters, sequencing)["1.down"]
    wanted = 0.25 * parameters[shared_name("1.down")] + 0.75 * parameters["1.down"].mean(1)
    torch.testing.assert_close(found, wanted)


def test_experts_need_equally_many_pairs(block):
    with pytest.raises(ValueError, match="multiple of the 3 experts here, got 8 pairs"):
        train_sequence(block, 1, BATCH, RATE, SETTINGS, Sequencing(experts=3))


def test_every_expert_may_see_a_whole_batch(block):
    whole = Sequencing(whole_batch=True)
    trained = train_sequence(block, 2, BATCH, RATE, SETTINGS, whole)
    assert not torch.allclose(trained["0.up"][:, 0], trained["0.up"][:, 3]), "each in an order of its own"


# ---- the token mixture -------------------------------------------------------------------------------------------

PAPER = ummrm.UpcycleConfig()
XFT = ummrm.UpcycleConfig(
    router="mlp", router_noise="learned", balancing_loss="cv_squared", balancing_loss_coef=0.01, z_loss_coef=0.0
)


def product_mixture(block, parameters, config, replica):
    """The product's mixture with a replica's tensors."""
    ffns = block.network.expert_names("ffn")
    dense = {
        name: value[:, 0] if name in ffns else value for name, value in parameters.items() if ".router" not in name
    }
    model = ummrm.upcycle(block.network.to_stock(dense, replica), config)
    with torch.no_grad():
        for layer in range(2):
            ffn = model.model.layers[layer].mlp
            for name, experts in (("up", "gate_up_proj"), ("down", "down_proj")):
                stack = parameters[f"{layer}.{name}"][replica]
                getattr(ffn.shared_experts, experts).copy_(stack[:1])
                getattr(ffn.experts, experts).copy_(stack[1:])
            ffn.router.weight.copy_(parameters[f"{layer}.router"][replica])
            if config.router == "mlp":
                ffn.router.output_weight.copy_(parameters[f"{layer}.router_output"][replica])
    return model


@pytest.mark.parametrize("config", [PAPER, XFT], ids=["paper", "xft"])
def test_the_token_mixture_is_the_products(block, config):
    """Rewards, the loss of UmmRewardTrainer (preference loss and `ummrm.auxiliary_loss`), and gradients; no noise."""
    start = token_upcycled(block, config)
    noisy = {
        name: value + 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        if name.split(".")[-1] in ("up", "down", "router", "router_output")
        else value
        for name, value in start.items()
    }
    parameters = {name: value.clone().requires_grad_() for name, value in noisy.items()}
    model = product_mixture(block, noisy, config, 1).eval()
    features = block.train.take(torch.arange(2), torch.arange(8).expand(2, -1))
    mixture = TokenMixture(block.network, config, parameters)
    losses = pair_losses(block.network.rewards(parameters, features, mixture=mixture)) + mixture.auxiliary_loss()
    losses.sum().backward()

    rewards = model(**inputs(features, 1)).logits[:, 0].view(-1, 2)
    loss = preference_loss(rewards[:, 0], rewards[:, 1]) + ummrm.auxiliary_loss(model)
    loss.backward()
    torch.testing.assert_close(losses[1], loss, atol=1e-6, rtol=1e-5)
    ffn = model.model.layers[0].mlp
    found = {name: parameters[f"0.{name}"].grad[1] for name in ("up", "down", "router")}
    torch.testing.assert_close(found["up"][1:], ffn.experts.gate_up_proj.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found["down"][:1], ffn.shared_experts.down_proj.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found["router"], ffn.router.weight.grad, atol=1e-6, rtol=1e-4)


def test_merge_weights_are_learned_and_merged_as_the_product_does(block):
    trained = train_token(block, 3, BATCH, RATE, SETTINGS, PAPER)
    settings = dataclasses.replace(SETTINGS, warmup_steps=0, weight_decay=0.0)
    alpha = learn_alpha(block, trained, STEPS, BATCH, 5e-2, settings, PAPER.num_experts, 0.5)
    assert alpha.abs().max() > 0.01
    model = ummrm.prepare_merge(product_mixture(block, trained, PAPER, 1), ummrm.MergeConfig())
    logits = [p for n, p in model.named_parameters() if p.requires_grad]
    assert len(logits) == 2
    optimiser = torch.optim.AdamW(logits, lr=5e-2, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimiser, 0, STEPS)
    for step in range(STEPS):
        rewards = model(**batch_at(block, step, 1, "alpha")).logits[:, 0].view(-1, 2)
        preference_loss(rewards[:, 0], rewards[:, 1]).backward()
        clip_grad_norm_(logits, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    for layer, learned in enumerate(logits):
        torch.testing.assert_close(alpha[1, layer], learned.detach().flatten(), atol=1e-4, rtol=1e-3)
    dense = block.network.from_stock(ummrm.merge(model))
    for name, value in merged(block, trained, alpha, 0.5).items():
        torch.testing.assert_close(value[1], dense[name][0], atol=1e-4, rtol=1e-3, msg=name)


def test_a_student_comes_nearer_to_its_teacher(block):
    targets = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).double()
    student = distil(block, block.unlabelled, block.start, targets, 60, 16, 1e-2, SETTINGS)
    everything = block.unlabelled.take(torch.arange(2), torch.arange(32).expand(2, -1))

    def gap(parameters):
        return (block.network.rewards(parameters, everything) - targets).square().mean()

    assert gap(student) < 0.7 * gap(block.start)
