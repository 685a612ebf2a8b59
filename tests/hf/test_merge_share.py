"""A fixed lambda in a Hugging Face model: in its weights, beside its configuration, and the two always agree."""

import copy
import json

import pytest
import torch
from tiny_models import outputs_of, padded_batch, perturb_experts, tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import MergeConfig, UpcycleConfig

CONFIG = UpcycleConfig(num_experts=4, num_experts_per_tok=2, num_shared_experts=2)
NAME = "model.umm_merge_share.share"


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    return perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIG))


def prepared(mixture, shared_share):
    return ummrm.prepare_merge(copy.deepcopy(mixture), MergeConfig(shared_share=shared_share))


def test_loaded_weights_bring_their_lambda_and_the_configuration_follows(mixture, tmp_path):
    saved, other, batch = prepared(mixture, 0.9), prepared(mixture, 0.5), padded_batch()
    assert not torch.equal(outputs_of(other, batch), outputs_of(saved, batch))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(outputs_of(other, batch), outputs_of(saved, batch))
    assert other.config.merge_config == MergeConfig(shared_share=0.9)
    torch.testing.assert_close(outputs_of(ummrm.merge(other), batch), outputs_of(saved, batch), rtol=1e-5, atol=1e-6)

    other.get_buffer(NAME).fill_(0.25)  # set by hand: no load to follow
    ummrm.save_pretrained(ummrm.merge(other), tmp_path / "merged")
    assert "| shared_share | 0.25 |" in (tmp_path / "merged" / "README.md").read_text()
    other.save_pretrained(tmp_path / "moe")
    assert other.config.merge_config == MergeConfig(shared_share=0.25)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    assert loaded.config.merge_config == MergeConfig(shared_share=0.25)
    assert torch.equal(outputs_of(loaded, batch), outputs_of(other, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_lambda_keeps_fp32_in_every_dtype(dtype, mixture, tmp_path):
    prepared(mixture, 0.9).to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype and torch.equal(loaded.state_dict()[NAME], torch.tensor([0.9]))
    assert torch.equal(loaded.bfloat16().state_dict()[NAME], torch.tensor([0.9]))
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        f"model.layers.{i}.mlp.alpha" for i in range(2)
    ]


def test_a_folder_whose_configuration_names_another_lambda_is_refused(mixture, tmp_path):
    prepared(mixture, 0.9).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["umm_merge"]["shared_share"] = 0.7
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"shared_share=0.7 in config.json and 0.9 in its weights.*umm_merge_share"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
