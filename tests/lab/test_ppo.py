"""PPO: its parts against definitions and hand computation, the whole against KL-regularised optima in closed form."""

import dataclasses
import math

import pytest
import torch
from tiny_models import tiny_config
from tiny_policies import END, A, all_answers, answer_log_probabilities, prompts, tiny_policy
from transformers import AutoModelForCausalLM

from lab.advantages import gae, token_rewards, whiten
from lab.policy import PolicyModel, sample
from lab.ppo import PPO, PPOConfig, clipped_objective, explained_variance, run_ppo

SHORT = PPOConfig(steps=3, batch_size=12, normalisation_samples=32, learning_rate=4e-3)


def ragged_mask(rows, columns):
    """Live positions contiguous in each row, starting and ending anywhere, at least one."""
    start = torch.randint(columns, (rows, 1))
    stop = start + 1 + (torch.rand(rows, 1) * (columns - start)).long()
    position = torch.arange(columns)
    return (position >= start) & (position < stop)


# ---- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient"),
    [  # clip 0.2; the gradient is by the log-ratio: ratio * A where not clipped, else 0
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.4, 0.0),
        (0.5, 2.0, 1.0, 1.0),
        (1.5, -2.0, -3.0, -3.0),
        (0.9, -2.0, -1.8, -1.8),
        (0.5, -2.0, -1.6, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, objective, gradient):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value, clipped = clipped_objective(log_ratio, torch.tensor([advantage], dtype=torch.float64), clip=0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(objective) and log_ratio.grad.item() == pytest.approx(gradient)
    assert clipped.item() == (advantage != 0 and gradient == 0)


def gae_by_definition(rewards, values, mask, discount, decay):
    result = torch.zeros_like(rewards)
    for n in range(len(rewards)):
        live = mask[n].nonzero().squeeze(1).tolist()
        delta = {}
        for t in live:
            after = values[n, t + 1] if t + 1 in live else 0.0
            delta[t] = rewards[n, t] + discount * after - values[n, t]
        for t in live:
            result[n, t] = sum((discount * decay) ** (u - t) * delta[u] for u in live if u >= t)
    return result


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_one_step_errors(discount, decay):
    mask = ragged_mask(20, 7)
    rewards, values = torch.randn(2, 20, 7, dtype=torch.float64)  # not zero outside the mask: it must not matter
    expected = gae_by_definition(rewards, values, mask, discount, decay)
    torch.testing.assert_close(gae(rewards, values, mask, discount, decay), expected)


def test_gae_at_its_limits_is_the_one_step_error_and_the_return_less_the_value():
    rewards, values = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.ones(5, 6, dtype=torch.bool)
    following = torch.cat([values[:, 1:], torch.zeros(5, 1)], dim=1)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0), rewards + 0.9 * following - values)
    powers = 0.9 ** (torch.arange(6) - torch.arange(6)[:, None]).double()
    returns = rewards @ powers.triu().T
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 1.0), returns - values)


def test_the_score_goes_to_the_last_chosen_token_and_the_penalty_to_each():
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    penalty = torch.tensor([[9.0, 1.0, -2.0, 9.0], [9.0, 9.0, 9.0, 3.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), penalty, mask)
    assert rewards.tolist() == [[0, -1, 12, 0], [0, 0, 0, 17]]
    with pytest.raises(ValueError, match="live position in every row"):
        token_rewards(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_whitening_is_over_live_tokens_alone():
    mask = ragged_mask(20, 7)
    values = 5 + 3 * torch.randn(20, 7, dtype=torch.float64)
    result = whiten(values, mask)
    live = values[mask]
    torch.testing.assert_close(result[mask], (live - live.mean()) / live.std(correction=0))
    assert (result[~mask] == 0).all()
    for constant in (0.0, 0.1, 1e6):
        equal = torch.full((20, 7), constant)
        assert whiten(equal, mask).abs().max() < 0.1, "rounding is no signal"


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(returns + 5, returns) == pytest.approx(1), "a shift explains as much"
    assert explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones(4)))


def test_the_expected_gradient_is_that_of_reward_less_beta_times_the_kl_of_answers():
    """Over all answers, each weighted by its probability, against autograd through the enumerated objective itself."""
    policy, reference, beta = tiny_policy(seed=0), tiny_policy(seed=1), 0.7
    sequences, mask = all_answers(policy)
    rewards = torch.randn(len(sequences), dtype=torch.float64)
    parameters = list(policy.network.double().parameters())
    token = sequences.tokens[:, 1:, None]

    def chosen(model):
        logits = model.network(input_ids=sequences.tokens[:, :-1], use_cache=False).logits.double()
        logits = logits.masked_fill(~model.allowed, -1e9)
        return logits.log_softmax(-1).gather(2, token).squeeze(2).masked_fill(~mask, 0.0)

    new = chosen(policy)
    start = chosen(reference).detach()
    answer = new.sum(1)
    exact = (answer.exp() * (rewards - beta * (answer - start.sum(1)))).sum()
    expected = torch.autograd.grad(exact, parameters, retain_graph=True)

    penalty = beta * (new.detach() - start)
    values = torch.randn(1, mask.shape[1], dtype=torch.float64).expand(mask.shape)  # any baseline of the state
    advantages = gae(token_rewards(rewards, penalty, mask), values, mask, 1.0, 1.0)
    objective, _ = clipped_objective(new - new.detach(), advantages, 0.2)
    weighted = (answer.detach().exp()[:, None] * objective).sum()
    for got, want in zip(torch.autograd.grad(weighted, parameters), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)  # Llama's norms compute in fp32


# ---- closed forms ----------------------------------------------------------------------------------------------


def table_scorer(sequences, rewards):
    """Looks whole sequences up in a table of rewards."""
    table = {tuple(row[:n]): r for row, n, r in zip(*lists(sequences), rewards.tolist(), strict=True)}
    return lambda s: torch.tensor([table[tuple(row[:n])] for row, n in zip(*lists(s), strict=True)])


def lists(sequences):
    return sequences.tokens.tolist(), sequences.lengths.tolist()


def optimise(policy, rewards, config):
    """PPO with a falling learning rate; KL(optimum || policy), the value of the start, and the optimum's."""
    sequences, mask = all_answers(policy)
    beta = config.kl_coefficient
    start = answer_log_probabilities(policy, sequences, mask)
    partition = (start + rewards / beta).logsumexp(0)
    optimum = start + rewards / beta - partition
    assert (optimum.exp() * (optimum - start)).sum() > 0.3, "the optimum is no feat"
    scorer = table_scorer(sequences, rewards)
    ppo = PPO(policy, prompts(), scorer, scorer, config, seed=0)
    for step in range(config.steps):
        for optimizer, rate in zip(ppo.optimizers, (config.learning_rate, config.value_learning_rate), strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / config.steps)
        ppo.step()
    result = answer_log_probabilities(ppo.policy, sequences, mask)
    with torch.no_grad():
        value = ppo.value(sequences)[0, 1].item()
    return (optimum.exp() * (optimum - result)).sum().item(), value, beta * partition.item()


CLOSED_FORM = PPOConfig(
    steps=40,
    batch_size=256,
    epochs=4,
    minibatches=1,
    learning_rate=5e-3,
    value_learning_rate=1e-2,
    kl_coefficient=0.5,
    normalise_reward=False,
)


def test_a_bandit_ends_at_the_closed_form_optimum():
    """One choice among six answers: the optimum of E[r] - beta KL is the start times exp(r / beta), normalised."""
    policy = tiny_policy(max_answer_tokens=2, words=5, sharpness=2.0)
    rewards = torch.tensor([0.3, 1.0, -0.5, 0.8, 0.0, 0.4], dtype=torch.float64)
    distance, value, best = optimise(policy, rewards, CLOSED_FORM)
    assert distance < 0.005
    assert value == pytest.approx(best, abs=0.02)


def test_answers_of_several_tokens_end_at_the_closed_form_optimum_over_whole_answers():
    """What a token does to the divergence of later ones must reach it: the optimum is over answers, not tokens."""
    policy = tiny_policy(max_answer_tokens=4, words=2, sharpness=2.0)
    sequences, _ = all_answers(policy)
    noise = torch.randn(15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    distance, value, best = optimise(policy, 0.6 * letters(sequences) + 0.2 * noise, CLOSED_FORM)
    assert distance < 0.02
    assert value == pytest.approx(best, abs=0.05)


# ---- runs ------------------------------------------------------------------------------------------------------


def letters(sequences):
    """A reward: A tokens after the prompt, less half of the other words."""
    body = sequences.tokens[:, 2:]
    return (body == A).sum(1).double() - 0.5 * (body > A).sum(1)


def short_run(seed=0, config=SHORT, scorer=letters, gold=lambda s: s.lengths.double(), **arguments):
    return run_ppo(tiny_policy(words=4, max_answer_tokens=6), prompts(), scorer, gold, config, seed, **arguments)


def test_a_rerun_gives_the_same_numbers_bit_for_bit_and_leaves_its_start_and_the_global_state_alone():
    policy = tiny_policy(words=4, max_answer_tokens=6)
    before, state = policy.copy(), torch.random.get_rng_state()
    config = dataclasses.replace(SHORT, entropy_coefficient=0.01)
    runs = [run_ppo(policy, prompts(), letters, letters, config, seed) for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert runs[0][0].kl == 0 and runs[0][1:] != runs[2][1:]
    assert torch.equal(state, torch.random.get_rng_state())
    for p, q in zip(policy.network.parameters(), before.network.parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None


def test_records_are_complete_and_the_last_is_of_the_final_policy():
    seen = []
    records = short_run(measures={"words": lambda s: (s.tokens > END).sum(1).double()}, on_step=seen.append)
    assert seen == records and [r.step for r in records] == [0, 1, 2, 3]
    assert records[0].kl == records[0].kl_estimate == 0 and records[-1].kl > 0
    for record in records:
        row = record.to_dict()
        assert 1 <= record.length <= 6 and record.length + 2 == pytest.approx(record.gold)
        assert row["words"] == record.measures["words"] > 0 and "measures" not in row
        assert record.entropy > 0
        updated = record is not records[-1]
        assert (record.clip_fraction is not None) == (record.value_loss is not None) == updated
    assert sum(r.clip_fraction for r in records[:-1]) > 0, "at this learning rate some tokens are clipped"


def test_smaller_forwards_change_nothing_but_rounding():
    whole, parts = short_run(), short_run(config=dataclasses.replace(SHORT, forward_batch_size=5))
    for one, other in zip(whole, parts, strict=True):
        for name in ("kl", "kl_estimate", "reward", "gold", "entropy"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2"])
def test_policies_of_other_families_train_on_ragged_prompts(family):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(
            tiny_config(family, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False)
        )
    allowed = torch.arange(network.config.vocab_size) >= 2
    policy = PolicyModel(network.eval(), allowed, end_token=2, pad_token_id=0, max_answer_tokens=5)
    ragged = prompts([7, 8, 1], [9, 1], [5, 6, 7, 8, 1])
    rollout = sample(policy, ragged, torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = policy.log_probabilities(rollout.sequences).gather(2, rollout.sequences.tokens[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(rollout.logprobs, again.masked_fill(~rollout.mask, 0.0), rtol=1e-3, atol=1e-4)
    records = run_ppo(policy, ragged, lambda s: s.tokens.double().mean(1), letters, SHORT, seed=0)
    assert records[0].kl == 0 < records[-1].kl and records[-1].proxy > records[0].proxy


def test_gold_is_only_watched():
    first, second = short_run(), short_run(gold=lambda s: -3.0 * s.lengths)
    assert [dataclasses.replace(r, gold=0) for r in first] == [dataclasses.replace(r, gold=0) for r in second]


def test_normalised_rewards_do_not_depend_on_the_scorers_units():
    plain, scaled = short_run(), short_run(scorer=lambda s: 7 * letters(s) - 30)
    for one, other in zip(plain, scaled, strict=True):
        assert other.reward == pytest.approx(one.reward, abs=1e-4) and other.kl == pytest.approx(one.kl, rel=1e-3)
        assert other.proxy == pytest.approx(7 * one.proxy - 30)
    raw = short_run(config=dataclasses.replace(SHORT, normalise_reward=False))
    assert all(r.reward == r.proxy for r in raw)


def test_a_larger_coefficient_keeps_the_policy_closer():
    kls = []
    for coefficient in (0.0, 5.0):
        config = dataclasses.replace(SHORT, steps=6, batch_size=64, kl_coefficient=coefficient)
        kls.append(short_run(config=config)[-1].kl)
    assert kls[1] < 0.3 * kls[0]


def test_an_entropy_bonus_keeps_the_policy_broad():
    entropies = []
    for coefficient in (0.0, 1.0):
        config = dataclasses.replace(SHORT, steps=6, batch_size=64, entropy_coefficient=coefficient)
        entropies.append(short_run(config=config)[-1].entropy)
    assert entropies[1] > 1.2 * entropies[0]


@pytest.mark.parametrize("epochs", [1, 2])
def test_divergence_of_the_weights_stops_the_run(epochs):
    config = dataclasses.replace(SHORT, learning_rate=1e30, epochs=epochs, minibatches=1)
    with pytest.raises(
        FloatingPointError, match="probabilities are NaN" if epochs == 1 else "a loss became nan at step 0"
    ):
        short_run(config=config)


def test_every_prompt_comes_as_often_as_any_other():
    ppo = PPO(tiny_policy(), prompts([A, 1], [A, A, 1], [1]), letters, letters, SHORT, seed=0)
    sequences = ppo._rollout(11).sequences
    starts = torch.where(sequences.tokens[:, 0] == 1, 0, torch.where(sequences.tokens[:, 1] == 1, 1, 2))
    assert sorted(starts.bincount().tolist()) == [3, 4, 4]


@pytest.mark.parametrize(
    ("scorer", "error", "message"),
    [
        (lambda s: torch.zeros(len(s), 1), ValueError, r"`scorer` must return one reward a sequence, \[32\], got \[32"),
        (lambda s: torch.full((len(s),), math.nan), FloatingPointError, "`scorer` returned a reward that is NaN"),
        (lambda s: torch.ones(len(s)), ValueError, "one and the same reward.*`normalise_reward` to False"),
    ],
)
def test_bad_scorers_are_refused(scorer, error, message):
    with pytest.raises(error, match=message):
        short_run(scorer=scorer)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "`steps` must be at least 1, got 0"),
        ("clip", 0.0, "`clip` must be above 0"),
        ("decay", 1.5, r"`decay` must be in \[0, 1\], got 1.5"),
        ("kl_coefficient", -1.0, "`kl_coefficient` must be at least 0"),
        ("minibatches", 65, "`minibatches` must be at most batch_size=64"),
        ("normalisation_samples", 1, "`normalisation_samples` must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**{field: value})
