"""Models that an engine has sharded, in one process: merged, saved and read as the whole ones are, bit for bit.

That several processes do it without waiting for each other for ever is shown where they train
(tests/trainer/test_engines.py).
"""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_families import randomise_alpha
from tiny_models import padded_batch, perturb_experts, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.hf.ensembles import score_texts
from ummrm.hf.saving import save_shared
from ummrm.hf.sharding import class_of, gathered, is_sharded, shared, unpartitioned, whole
from ummrm.merge import save_merged
from ummrm.nn.dense import Projection

TOKEN = UpcycleConfig(num_experts=3, num_experts_per_tok=2, router_init_std=1.0)
SEQUENCE = UpcycleConfig(assignment="sequence", experts_in="all")
MERGES = {
    "fixed lambda": (TOKEN, MergeConfig(shared_share=0.3)),
    "lambda learned": (TOKEN, MergeConfig(alpha_per="projection", learn_shared_share=True)),
    "all linear layers": (SEQUENCE, MergeConfig(shared_share=0.0)),
    "by sequence, unprepared": (SEQUENCE, None),
}


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model, mesh, policy=None, wrapped=False):
    """As accelerate does it: layer by layer, under its activation checkpointing if asked for."""
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for index, layer in enumerate(model.base_model.layers):
        if wrapped:
            model.base_model.layers[index] = layer = checkpoint_wrapper(layer, preserve_rng_state=False)
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def merging(kind):
    torch.manual_seed(0)
    config, merge_config = MERGES[kind]
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama"), config))
    if merge_config is not None:
        randomise_alpha(ummrm.prepare_merge(moe, merge_config))
    return moe


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("kind", MERGES)
def test_a_sharded_model_merges_as_a_whole_one(kind, wrapped, mesh, tmp_path):
    expected, moe = ummrm.merge(merging(kind)), merging(kind)
    coefficients = {} if MERGES[kind][1] is None else ummrm.merge_coefficients(moe)
    shard(moe, mesh, wrapped=wrapped)
    assert is_sharded(moe)
    if coefficients:
        again = ummrm.merge_coefficients(moe)
        assert again.keys() == coefficients.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in coefficients.items())
    merged = ummrm.merge(moe)
    assert type(merged) is type(expected) and not any(isinstance(p, DTensor) for p in merged.parameters())
    save_merged(moe, tmp_path / "merged")
    ummrm.save_pretrained(expected, tmp_path / "expected")
    assert (tmp_path / "merged/config.json").read_text() == (tmp_path / "expected/config.json").read_text()
    assert (tmp_path / "merged/README.md").read_text() == (tmp_path / "expected/README.md").read_text()
    written = load_file(tmp_path / "merged/model.safetensors")
    assert written.keys() == load_file(tmp_path / "expected/model.safetensors").keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor) and torch.equal(written[name], tensor), name
    assert all(isinstance(p, DTensor) for p in moe.parameters()), "it is left as it was"


@pytest.mark.parametrize("kind", ["fixed lambda", "lambda learned", "by sequence, unprepared"])
def test_a_sharded_model_is_saved_as_a_whole_one(kind, mesh, tmp_path):
    """After a forward in bf16 too, which leaves the head's parameters gathered in it."""
    moe = merging(kind).eval()
    expected = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    moe.save_pretrained(tmp_path / "expected")
    shard(moe, mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        moe(**padded_batch())
    save_shared(moe, tmp_path / "saved")
    assert class_of(moe).__name__ == "UmmLlamaForSequenceClassification"
    assert (tmp_path / "saved/config.json").read_text() == (tmp_path / "expected/config.json").read_text()
    written = load_file(tmp_path / "saved/model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    loaded = type(merging(kind)).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())


def test_what_is_gathered_is_put_back(mesh):
    moe = merging("fixed lambda")
    alpha = [p.detach().clone() for n, p in moe.named_parameters() if n.endswith("alpha")]
    shard(moe, mesh)
    before = dict(moe.named_parameters())
    with gathered(moe, names=("alpha",)):
        read = [p for n, p in moe.named_parameters() if n.endswith("alpha")]
        assert all(torch.equal(a, b) and not isinstance(b, DTensor) for a, b in zip(alpha, read, strict=True))
        assert sum(isinstance(p, DTensor) for p in moe.parameters()) == len(before) - len(alpha)
    assert all(p is before[n] for n, p in moe.named_parameters())
    with pytest.raises(KeyError), gathered(moe):
        raise KeyError
    assert all(p is before[n] for n, p in moe.named_parameters())


def test_shared_weights_are_refused_where_whole_ones_are_needed(mesh):
    dense = tiny_model("llama")
    shard(dense, mesh)
    with pytest.raises(ValueError, match="`dense` must hold whole weights, and processes share them"):
        ummrm.upcycle(dense, TOKEN)
    ffn = ummrm.UpcycledFFN.from_dense(tiny_model("llama").model.layers[0].mlp, TOKEN)
    network = fully_shard(ummrm.prepare_merge(nn.Sequential(ffn)), mesh=mesh)
    with pytest.raises(ValueError, match="`moe` must hold whole weights, or be a Hugging Face model, got a sharded"):
        ummrm.merge(network)


def test_shapes_are_those_of_whole_parameters():
    """As ZeRO-3 leaves them where a checkpoint is loaded: without elements."""
    linear = nn.Linear(6, 10)
    linear.weight.data, linear.weight.ds_shape = torch.empty(0), torch.Size([10, 6])
    assert (Projection(linear).in_features, Projection(linear).out_features) == (6, 10)
    assert Projection(linear, half=1).out_features == 5


def test_partitions_without_an_engine_are_refused():
    model = tiny_model("llama")
    model.score.weight.ds_id = 0
    with pytest.raises(ValueError, match="must be whole to run before it is trained, and ZeRO-3 has partitioned it"):
        score_texts(model, [[5, 6]], 1)


def test_processes_that_share_a_model_run_as_many_forwards(mesh):
    """Of three batches the second of two processes has one, and runs two."""
    moe = merging("fixed lambda").eval()
    texts = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    expected = score_texts(moe, texts, 1)
    shard(moe, mesh)
    seen = []
    moe.register_forward_pre_hook(lambda *_: seen.append(1))
    parts = [score_texts(moe, texts, 1, share=(rank, 2)) for rank in range(2)]
    assert len(seen) == 4
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize("wrapped", [False, True], ids=["by layer", "for scores"])
def test_members_of_a_sharded_mixture_score(wrapped, mesh):
    """Outside `forward`: what FSDP2 hooks into calls runs for them too."""
    torch.manual_seed(0)
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama"), SEQUENCE)).eval()
    batch = padded_batch()
    expected = moe.member_scores(**batch).detach()
    assert expected.std(1).min() > 0
    with shared(moe, torch.device("cpu")) if wrapped else contextlib.nullcontext(shard(moe, mesh)), torch.no_grad():
        assert is_sharded(moe)
        for _ in range(2):
            assert torch.equal(moe.member_scores(**batch), expected)


def test_a_whole_tensor_is_itself():
    tensor = nn.Parameter(torch.randn(3))
    assert whole(tensor).data_ptr() == tensor.data_ptr() and not whole(tensor).requires_grad


def test_what_is_to_be_whole_is_loaded_by_every_process(monkeypatch):
    from transformers.integrations.fsdp import is_fsdp_enabled

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert is_fsdp_enabled()
    with unpartitioned():
        assert not is_fsdp_enabled()
    assert is_fsdp_enabled() and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_the_private_name_of_transformers_is_there():
    class Settings:
        def is_zero3(self):
            return True

    held = Settings()
    deepspeed.set_hf_deepspeed_config(held)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with unpartitioned():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
