"""Merged models in transformers 4.57, which evaluation tools still pin: they load there and score the same."""

import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import outputs_of, padded_batch, perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig

PYTHON = Path(__file__).resolve().parent.parent / ".venvs/transformers4.57/bin/python"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 777.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = [
    ("llama", {"rope_type": "default", "rope_theta": 777.0}),
    ("llama", LLAMA3),
    ("gpt_neox", {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}),
    ("bert", None),
]


@pytest.mark.full
@pytest.mark.parametrize(("model_type", "rope"), CASES)
def test_merged_models_score_the_same_in_transformers_4(model_type, rope, tmp_path):
    assert PYTHON.exists(), "run `make test-full`, which makes the environments of this tier"
    overrides = {} if rope is None else {"rope_parameters": rope}
    moe = perturb_experts(ummrm.upcycle(tiny_model(model_type, **overrides), UpcycleConfig()))
    merged = ummrm.merge(ummrm.prepare_merge(moe))
    merged.save_pretrained(tmp_path / "merged")
    batch = padded_batch()
    expected = outputs_of(merged, batch)
    torch.save(batch, tmp_path / "batch.pt")
    script = textwrap.dedent(f"""
        import torch, transformers
        assert transformers.__version__.startswith("4.57."), transformers.__version__
        from transformers import AutoModelForSequenceClassification as Auto
        model, info = Auto.from_pretrained({str(tmp_path / "merged")!r}, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        torch.save(model(**torch.load({str(tmp_path / "batch.pt")!r})).logits.detach(), {str(tmp_path / "out.pt")!r})
    """)
    done = subprocess.run([PYTHON, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt").flatten(), expected, rtol=1e-5, atol=1e-5)
