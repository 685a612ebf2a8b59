"""Policies over so few tokens that every answer can be listed, and their exact probabilities."""

from itertools import product

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lab.policy import PolicyModel
from lab.tasks import Sequences

PAD, SEPARATOR, END, A, B = range(5)


def tiny_policy(max_answer_tokens=4, words=2, sharpness=3.0, seed=0, allowed=None):
    """A random Llama over `words` answer tokens and the end token, whose distributions are far from uniform."""
    vocabulary = A + words
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.3,
                pad_token_id=PAD,
                bos_token_id=None,
                eos_token_id=END,
            )
        ).eval()
        network.lm_head.weight.data.mul_(sharpness)
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    mask[[END, *range(A, vocabulary)] if allowed is None else allowed] = True
    return PolicyModel(network, mask, END, PAD, max_answer_tokens)


def prompts(*rows):
    return Sequences.from_lists(rows or [[A, SEPARATOR]], PAD)


def all_answers(policy, prompt=(A, SEPARATOR)):
    """Every answer to a prompt as Sequences, and the mask [N, L - 1] of the tokens that the policy chooses."""
    words = [t for t in policy.allowed.nonzero().squeeze(1).tolist() if t != END]
    longest = policy.max_answer_tokens - 1
    bodies = [body for n in range(longest + 1) for body in product(words, repeat=n)]
    sequences = Sequences.from_lists([[*prompt, *body, END] for body in bodies], PAD)
    position = torch.arange(sequences.tokens.shape[1] - 1)
    chosen = torch.tensor([min(len(body) + 1, longest) for body in bodies])[:, None]
    start = len(prompt) - 1
    return sequences, (position >= start) & (position < start + chosen)


@torch.no_grad()
def answer_log_probabilities(policy, sequences, mask):
    """fp64 [N]: log-probability of each whole answer."""
    logprobs = policy.log_probabilities(sequences).double()
    picked = logprobs.gather(2, sequences.tokens[:, 1:, None]).squeeze(2)
    return picked.masked_fill(~mask, 0.0).sum(1)
