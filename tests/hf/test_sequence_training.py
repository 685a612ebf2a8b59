"""Training by sequence as reward-model trainers do it: checkpointed forwards in any order, autocast, 16-bit weights."""

import contextlib
import copy
import threading

import pytest
import torch
from test_sequence_families import fitting
from test_training import SeenDtypes
from tiny_models import outputs_of, padded_batch, perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig, preference_loss

ALL = UpcycleConfig(assignment="sequence", experts_in="all")
SHARED = UpcycleConfig(assignment="sequence", num_shared_experts=2, fixed_shared_weight=0.25)
CONFIGS = {"all": ALL, "shared": SHARED}


def mixture(config, model_type="llama", dtype=torch.float32):
    return perturb_experts(ummrm.upcycle(tiny_model(model_type, dtype=dtype, **fitting(model_type, config)), config))


def training_step(moe, autocast):
    """Two forwards before one backward: a recomputation must not see the other forward's groups."""
    chosen, rejected = padded_batch(lengths=(9, 5, 3)), padded_batch(lengths=(4, 8), side="left")
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        first = moe(**chosen, groups=torch.tensor([3, 0, 1])).logits
        second = moe(**rejected, groups=torch.tensor([1, 0])).logits
        loss = preference_loss(first[:2], second) + first[2].square().sum()
    with torch.no_grad():  # and one more in between
        moe(**padded_batch(lengths=(2,)), groups=torch.tensor([2]))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in moe.named_parameters()}


# passing arguments on, in its encoder, beside the call, through a decoder; gpt2's are transposed
MODEL_TYPES = ["llama", "bert", "falcon", "deberta-v2", "opt", "gpt2"]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_with_and_without_checkpointing_are_equal(model_type, autocast):
    plain = mixture(ALL, model_type).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    batch_seed, results = torch.randint(2**31, ()).item(), []
    for moe in (plain, checkpointed):
        torch.manual_seed(batch_seed)  # the same batch and dropout
        results.append(training_step(moe, autocast))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    experts = 0
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
        if "experts." in name or "expert_" in name:
            experts += gradient[0].abs().max() > 0
            assert gradient[2].abs().max() == 0, "expert 2 had no sequence"
    assert experts > 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_errors_in_16_bits_stay_within_twice_the_dense_models_own(model_type, config, dtype):
    """On the backbone's hidden states: the error of three rewards would be chance."""
    truth_model, batch = tiny_model(model_type, dtype=torch.float64), padded_batch(lengths=(9, 7, 6))
    truth = outputs_of(truth_model.base_model, batch)
    dense = truth_model.to(dtype)
    own = (outputs_of(dense.base_model, batch).double() - truth).norm()
    moe = ummrm.upcycle(dense, config)
    assert {p.dtype for p in moe.parameters()} == {dtype}
    error = (outputs_of(moe.base_model, batch | {"groups": torch.tensor([3, 0, 1])}).double() - truth).norm()
    assert 0 < own and error <= 2 * own + 1e-3 * truth.norm()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_kernels_run_in_bf16_under_autocast(config):
    moe, modes = mixture(config).train(), SeenDtypes()
    with modes, torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(**padded_batch(), groups=torch.tensor([3, 0, 1])).logits
    with modes:
        out.float().sum().backward()
    assert {"expert_gemm", "activation"} <= modes.seen.keys() and not {"route", "permute"} & modes.seen.keys()
    assert all(dtypes == {torch.bfloat16} for dtypes in modes.seen.values()), modes.seen


def test_training_lowers_the_loss_and_moves_the_members_apart():
    torch.manual_seed(6)
    moe = ummrm.upcycle(tiny_model("llama"), ALL).train()
    chosen, rejected = padded_batch(lengths=(9, 5, 3, 8)), padded_batch(lengths=(4, 8, 2, 9))
    optimizer, losses = torch.optim.AdamW(moe.parameters(), 1e-3), []
    for step in range(40):
        groups = ummrm.draw_groups(4, 4, seed=0, step=step)
        loss = preference_loss(moe(**chosen, groups=groups).logits, moe(**rejected, groups=groups).logits)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert moe.eval().member_scores(**chosen).std(1).min() > 1e-3


def test_a_normalisation_folds_into_the_head_of_all_members():
    moe, batch = mixture(ALL, "bert"), padded_batch()
    normalization = ummrm.measure_rewards(moe, [batch])
    with torch.no_grad():
        expected = normalization(moe.member_scores(**batch))
        ummrm.set_reward_normalization(moe, normalization)
        torch.testing.assert_close(ummrm.score(moe, batch, normalized=True), expected.mean(1))
        assert ummrm.fold_reward_normalization(moe) is None
        torch.testing.assert_close(moe.member_scores(**batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["on its way", "inside"])
def test_a_second_thread_is_refused_and_a_copy_serves_it(where):
    """Also while the first one's groups are on their way to the backbone."""
    moe, batch, entered, go_on, said = mixture(ALL), padded_batch(), threading.Event(), threading.Event(), []
    expected = moe(**batch).logits

    def wait(*args):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert go_on.wait(30)

    moe.get_submodule("model" if where == "on its way" else "model.layers.0").register_forward_pre_hook(wait)
    other = threading.Thread(target=lambda: said.append(moe(**batch).logits))
    other.start()
    assert entered.wait(30)
    try:
        for call in (moe, moe.member_scores, lambda **kw: moe(**kw, groups=torch.tensor([0, 1, 2]))):
            with pytest.raises(RuntimeError, match="a mixture must run in one thread at a time"):
                call(**batch)
        torch.testing.assert_close(copy.deepcopy(moe)(**batch).logits, expected)
    finally:
        go_on.set()
        other.join()
    torch.testing.assert_close(said[0], expected)
