"""The policy: samples have its probabilities, divergences are those of enumeration, training learns the task."""

import dataclasses

import pytest
import torch
from tiny_policies import (
    END,
    PAD,
    SEPARATOR,
    A,
    B,
    all_answers,
    answer_log_probabilities,
    prompts,
    tiny_policy,
)

from lab.kl import divergence, entropy, token_kl
from lab.policy import PolicyConfig, Rollout, _answers, prompt_lengths, sample, train_policy
from lab.tasks import Sequences, SyntheticTaskConfig, make_synthetic_task

TASK = SyntheticTaskConfig(train_pairs=40, test_pairs=20, prompts=6, samples=128, topics=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def task():
    return make_synthetic_task(TASK, seed=3)


@pytest.fixture(scope="module")
def trained(task):
    return train_policy(task, PolicyConfig(hidden_size=32, intermediate_size=64, steps=100, batch_size=32), seed=1)


# ---- probabilities ---------------------------------------------------------------------------------------------


def test_probabilities_of_all_answers_sum_to_one():
    policy = tiny_policy()
    sequences, mask = all_answers(policy)
    assert len(sequences) == 15
    assert answer_log_probabilities(policy, sequences, mask).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_samples_occur_as_often_as_their_probability_says():
    policy, count = tiny_policy(), 20_000
    sequences, mask = all_answers(policy)
    expected = answer_log_probabilities(policy, sequences, mask).exp() * count
    rollout = sample(policy, prompts().select(torch.zeros(count, dtype=torch.long)), generator(), batch_size=count)
    index = {tuple(row[:n].tolist()): i for i, (row, n) in enumerate(zip(*tokens_of(sequences), strict=True))}
    seen = torch.zeros(len(sequences), dtype=torch.float64)
    for row, n in zip(*tokens_of(rollout.sequences), strict=True):
        seen[index[tuple(row[:n].tolist())]] += 1
    # chi squared with 14 degrees of freedom: 45 is exceeded with probability 4e-5; the draw is fixed besides
    assert ((seen - expected) ** 2 / expected).sum().item() < 45


def tokens_of(sequences):
    return sequences.tokens, sequences.lengths.tolist()


def test_log_probabilities_while_sampling_are_those_of_a_forward_over_whole_answers_of_ragged_prompts():
    policy = tiny_policy(max_answer_tokens=6, words=6)
    ragged = prompts([A, SEPARATOR], [B, A, A, B, SEPARATOR], [SEPARATOR], [A, B, SEPARATOR])
    rows = torch.arange(40) % 4
    rollout = sample(policy, ragged.select(rows), generator(), batch_size=16)
    sequences, lengths = rollout.sequences, rollout.sequences.lengths
    with torch.no_grad():
        logprobs = policy.log_probabilities(sequences).gather(2, sequences.tokens[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(rollout.logprobs, logprobs.masked_fill(~rollout.mask, 0.0), rtol=1e-4, atol=1e-5)
    for i, prompt in enumerate(rows.tolist()):
        start, stop = int(ragged.lengths[prompt]), int(lengths[i])
        body = sequences.tokens[i, :stop].tolist()
        assert body[:start] == ragged.tokens[prompt, :start].tolist()
        assert body[-1] == END and END not in body[start:-1]
        assert (sequences.tokens[i, stop:] == PAD).all()
        chosen = rollout.mask[i].nonzero().squeeze(1).tolist()
        forced = stop - start == 6
        assert chosen == list(range(start - 1, stop - 1 - forced)), "the end that the limit forces is no choice"
    assert (rollout.sequences.lengths - ragged.lengths[rows] == 6).any(), "no answer met the limit"


def test_tokens_that_are_not_allowed_never_come():
    policy = tiny_policy(max_answer_tokens=12, words=5, allowed=[END, A, A + 3])
    rollout = sample(policy, prompts([A + 1, SEPARATOR]).select(torch.zeros(200, dtype=torch.long)), generator())
    said = rollout.sequences.tokens[:, 1:][rollout.mask]
    assert set(said.tolist()) == {END, A, A + 3}


def test_the_least_and_the_largest_draw_choose_the_first_and_the_last_allowed_token():
    policy = tiny_policy(max_answer_tokens=6, words=5, allowed=[END, A, A + 2])
    for draw, token in ((0.0, END), (1 - 2**-53, A + 2)):
        answers, *_ = _answers(policy, prompts(), torch.full((1, 5), draw, dtype=torch.float64))
        assert answers[0, 0] == token


def test_sampling_depends_on_its_generator_alone():
    policy, many = tiny_policy(), prompts().select(torch.zeros(30, dtype=torch.long))
    first, again, other = (sample(policy, many, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first.sequences.tokens, again.sequences.tokens)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.sequences.lengths, other.sequences.lengths)
    drawn = generator(1)
    state = torch.random.get_rng_state()
    sample(policy, many, drawn)
    assert torch.equal(state, torch.random.get_rng_state())
    expected = generator(1)
    torch.rand(30 * 3, generator=expected, dtype=torch.float64)
    assert torch.equal(drawn.get_state(), expected.get_state()), "as many draws, however early all answers end"


# ---- divergence ------------------------------------------------------------------------------------------------


def test_kl_of_answers_is_the_expected_sum_of_the_exact_divergences_of_their_tokens():
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1)
    sequences, mask = all_answers(policy)
    log_p = answer_log_probabilities(policy, sequences, mask)
    log_q = answer_log_probabilities(reference, sequences, mask)
    truth = (log_p.exp() * (log_p - log_q)).sum().item()
    assert truth > 0.1
    measured = divergence(policy, reference, Rollout(sequences, torch.zeros(mask.shape), mask), batch_size=4)
    weighted = {name: (log_p.exp() * getattr(measured, name).double().sum(1)).sum().item() for name in vars(measured)}
    assert weighted["kl"] == pytest.approx(truth, rel=1e-5)
    assert weighted["log_ratio"] == pytest.approx(truth, rel=1e-5)
    assert weighted["entropy"] == pytest.approx(-(log_p.exp() * log_p).sum().item(), rel=1e-5)
    torch.testing.assert_close(measured.logprobs.double().sum(1), log_p, rtol=1e-5, atol=1e-5)


def test_sampled_divergences_agree_with_enumeration_and_the_exact_one_is_less_noisy():
    policy, reference = tiny_policy(seed=0), tiny_policy(seed=1)
    sequences, mask = all_answers(policy)
    log_p = answer_log_probabilities(policy, sequences, mask)
    truth = (log_p.exp() * (log_p - answer_log_probabilities(reference, sequences, mask))).sum().item()
    count = 8000
    rollout = sample(policy, prompts().select(torch.zeros(count, dtype=torch.long)), generator(4))
    measured = divergence(policy, reference, rollout, batch_size=count)
    for estimate, rows in (
        (measured.sequence_kl(), measured.kl.sum(1)),
        (measured.sequence_kl_estimate(), measured.log_ratio.sum(1)),
    ):
        assert abs(estimate - truth) < 4.5 * rows.std().item() / count**0.5
    assert measured.kl.sum(1).std() < measured.log_ratio.sum(1).std()
    assert (measured.kl >= -1e-6).all()


def test_a_policy_is_at_no_distance_from_itself_and_needs_a_reference_of_the_same_tokens():
    policy = tiny_policy()
    rollout = sample(policy, prompts().select(torch.zeros(20, dtype=torch.long)), generator())
    measured = divergence(policy, policy.copy(), rollout)
    assert measured.sequence_kl() == measured.sequence_kl_estimate() == 0
    with pytest.raises(ValueError, match="must allow the same tokens"):
        divergence(policy, tiny_policy(allowed=[END, A]), rollout)


def test_token_kl_and_entropy_on_known_distributions():
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    assert token_kl(p, q).item() == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item())
    assert entropy(p).item() == pytest.approx(1.5 * torch.log(torch.tensor(2.0)).item())


# ---- training --------------------------------------------------------------------------------------------------


def test_a_sequence_has_the_longest_prompt_that_it_begins_with():
    offered = Sequences.from_lists([[7, 1], [7, 8, 1], [7, 1, 9]], PAD)
    rows = Sequences.from_lists([[7, 1, 9, 3, 2], [7, 1, 3, 2], [7, 8, 1, 2], [7, 1]], PAD)
    assert prompt_lengths(rows, offered).tolist() == [3, 2, 3, 2]
    with pytest.raises(ValueError, match="begin with one of `prompts`; row 1 does not"):
        prompt_lengths(Sequences.from_lists([[7, 1], [7, 8]], PAD), offered)


def test_training_makes_samples_that_look_like_the_tasks(task, trained):
    assert sum(trained.losses[-20:]) / 20 < trained.losses[0] - 0.1
    rows = torch.arange(600) % 3
    rollout = sample(trained, task.prompts.select(rows), generator(5))
    tokens, real = rollout.sequences.tokens, task.policy.sequences
    said = set(tokens[:, 1:][rollout.mask].tolist())
    assert said <= {END, 3, *range(7, task.vocab_size)}, "topics, separator and padding are no part of answers"
    assert rollout.sequences.lengths.double().mean().item() == pytest.approx(real.lengths.double().mean(), abs=2)
    filler = (tokens == 3).sum(1).double().mean().item()
    assert filler == pytest.approx(task.policy.shortcut.mean().item(), abs=0.8)


def test_training_depends_on_its_seed_alone(task, trained):
    config = PolicyConfig(hidden_size=16, intermediate_size=16, steps=4, warmup_steps=1, batch_size=8)
    state = torch.random.get_rng_state()
    first, again, other = (train_policy(task, config, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.losses == again.losses != other.losses
    for a, b in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_task_of_another_form_is_refused(task):
    for change, message in (
        ({"end_token_id": 9}, "must all end in the task's end token, 9; row 0 does not"),
        ({"prompts": task.prompts.select(slice(1))}, "begin with one of `prompts`"),
        ({"prompts": None}, "must have `prompts` and an `end_token_id`.*'synthetic' has not"),
    ):
        with pytest.raises(ValueError, match=message):
            train_policy(dataclasses.replace(task, **change), PolicyConfig(), seed=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "`steps` must be at least 1, got 0"),
        ("max_answer_tokens", 1, "`max_answer_tokens` must be at least 2"),
        ("hidden_size", 60, "multiple of 2 \\* num_heads = 8"),
        ("warmup_steps", 150, "`warmup_steps` must be below steps=150"),
    ],
)
def test_impossible_policies_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**{field: value})
