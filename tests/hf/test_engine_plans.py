"""What transformers' distributed engine is told of each family, and what is refused before processes meet."""

import inspect

import pytest
import torch
from tiny_models import EACH_TYPE, tiny_model

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.hf.families import FAMILIES
from ummrm.hf.loading import load_checkpoint
from ummrm.hf.parallel import shard_of_stack
from ummrm.nn.experts import Experts

expert_parallel = pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.24 has it")
fsdp = pytest.importorskip("transformers.distributed.fsdp")
DistributedConfig = pytest.importorskip("transformers.distributed").DistributedConfig

CONFIG = UpcycleConfig(num_experts=4, num_experts_per_tok=2)
BY_SEQUENCE = UpcycleConfig(assignment="sequence", num_experts=4, experts_in="all")


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_every_rule_of_a_plan_names_something(model_type):
    """In the backbone alone too: FSDP2 gets the layers and the embeddings, expert parallelism all routed experts."""
    moe = ummrm.upcycle(tiny_model(model_type), CONFIG)
    row = FAMILIES[model_type]
    for model, prefix in ((moe, f"{moe.base_model_prefix}."), (moe.base_model, "")):
        names = dict(model.named_modules())
        layers = [name for name in model._expand_parallel_plan(model.fsdp_plan) if f"{row.layers}." in name]
        assert layers == [f"{prefix}{row.layers}.{i}" for i in range(2)]
        embeddings = next(n for n, module in names.items() if module is moe.get_input_embeddings())
        assert embeddings in model.fsdp_plan
        experts = {n for n, module in names.items() if isinstance(module, Experts) and "shared" not in n}
        held = {f"{name}.{key}" for name in experts for key, _ in names[name].named_parameters()}
        assert set(model._expand_parallel_plan(model.ep_plan)) == experts | held
        for plan in (model.tp_plan, model.fsdp_plan, model.ep_plan):
            model._validate_parallel_plan(plan, set(plan.values()), "plan")
            known = {".".join("*" if p.isdigit() else p for p in n.split(".")) for n in (*names, *held)}
            assert set(plan) <= known


WRONG = {
    "ep_size` must divide": (CONFIG, {"fsdp_size": 3, "ep_size": 3}, "choose one of 1, 2, 4"),
    "ep_size == tp_size": (CONFIG, {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"}, "all_to_all"),
    "pp_size` must be 1": (CONFIG, {"pp_size": 2}, "fsdp_size, ep_size"),
    "tp_size` must be 1": (BY_SEQUENCE, {"tp_size": 2}, "experts_in='all'"),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_the_engine_cannot_do_is_refused_before_processes_meet(said, tmp_path):
    config, settings, remedy = WRONG[said]
    ummrm.upcycle(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        load_checkpoint(tmp_path, distributed_config=DistributedConfig(**settings))
    assert remedy in str(error.value) and not torch.distributed.is_initialized()


@pytest.mark.parametrize("model_type", ["bert", "opt", "gpt2", "falcon"])
def test_a_family_without_a_plan_says_so(model_type, tmp_path):
    moe = ummrm.upcycle(tiny_model(model_type), CONFIG)
    moe.save_pretrained(tmp_path)
    for given in ({"tp_size": 2}, {"tp_size": 2, "ep_size": 2, "tp_plan": "auto"}):
        with pytest.raises(ValueError, match=f"transformers has no plan for {model_type}.*fsdp_size=2"):
            type(moe).from_pretrained(tmp_path, distributed_config=DistributedConfig(**given))


def test_a_merge_phase_has_no_expert_parallelism(tmp_path):
    moe = ummrm.prepare_merge(ummrm.upcycle(tiny_model("llama"), CONFIG), MergeConfig())
    assert moe.config.base_model_ep_plan is None
    moe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merge phase, got 2.*fsdp_size=2"):
        load_checkpoint(tmp_path, distributed_config={"fsdp_size": 2, "ep_size": 2})


@pytest.mark.parametrize("masked", [-1, 4])
def test_experts_run_what_an_index_names_and_leave_out_the_rest(masked):
    """The contract of transformers' experts: an index of n is another process's slot."""
    ffn = ummrm.UpcycledFFN.from_dense(tiny_model("llama").model.layers[0].mlp, CONFIG)
    x, weights = torch.randn(5, 24), torch.rand(5, 2)
    indices = torch.tensor([[0, 3], [1, masked], [masked, masked], [2, 0], [3, 1]])
    out = ffn.experts(x, indices, weights)
    expected = torch.zeros_like(x)
    for token in range(5):
        for slot in range(2):
            expert = int(indices[token, slot])
            if 0 <= expert < 4:
                gate, up = (ffn.experts.up[expert] @ x[token]).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                expected[token] += weights[token, slot] * (ffn.experts.down_proj[expert] @ hidden)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(IndexError):
        ffn.experts(x, indices.clamp_min(5), weights)


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [((8, 88, 24), 4, None), ((4, 88, 24), 8, 1), ((1, 42, 24), 8, 2), ((1, 88), 8, 1), ((3, 7, 5), 2, None)],
)
def test_a_stack_that_does_not_divide_is_cut_by_its_rows(shape, ranks, dim):
    """Of 4 experts on 8 ranks FSDP2 would give 4 a whole one each. What nothing divides is left to it."""
    found = shard_of_stack(torch.empty(shape, device="meta"), ranks)
    assert (None if found is None else found.dim) == dim


def test_private_names_of_the_engine_are_there():
    assert "_is_expert_parallel = True" in inspect.getsource(expert_parallel.MoEParamShard.shard_param)
    assert "fully_shard(" in inspect.getsource(fsdp.apply_fully_sharded_data_parallelism)
    assert "shard_placement_fn" in inspect.signature(fsdp.fully_shard).parameters
