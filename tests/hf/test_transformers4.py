"""Merged models in transformers 4.57, which evaluation tools still pin: they load there and score the same.

The keys that it reads are checked in the fast tier; the scores in the full tier, whose environment has that version.
"""

import json
import subprocess
import textwrap

import pytest
import torch
from checkout import ROOT
from tiny_models import MODEL_TYPES, in_tier, outputs_of, padded_batch, perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf.families import FAMILIES

PYTHON = ROOT / ".venvs/transformers4-57/bin/python"
CONFIG = UpcycleConfig(num_experts=3, num_experts_per_tok=2)
NO_ROPE = {m for m in MODEL_TYPES if not FAMILIES[m].rope_keys_v4}
TWO_BASES = {"gemma3_text", "modernbert"}
PARTIAL = {"phi", "stablelm", "gpt_neox", "phi3"}


def default_rope(model_type):
    """A base, and a rotated share, that no version has as its default."""
    if model_type in TWO_BASES:
        return {
            "full_attention": {"rope_type": "default", "rope_theta": 777.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
        }
    rope = {"rope_type": "default", "rope_theta": 777.0}
    return rope | ({"partial_rotary_factor": 0.75} if model_type in PARTIAL else {})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
SCALED = {
    "llama": {"rope_theta": 777.0, **LLAMA3},
    "qwen2": {"rope_theta": 777.0, **LINEAR},
    "phi": {"rope_theta": 777.0, "partial_rotary_factor": 0.75, **LINEAR},
    "olmo2": {"rope_theta": 777.0, **LINEAR},
    "phi3": {
        "rope_theta": 777.0,
        "partial_rotary_factor": 0.75,
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 16,  # phi3 keeps it in the configuration itself, in both versions
    },
    "gemma3_text": {
        "full_attention": {"rope_theta": 777.0, **LINEAR},
        "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
    },
}
CASES = [(m, None if m in NO_ROPE else default_rope(m)) for m in MODEL_TYPES] + list(SCALED.items())
IDS = [*MODEL_TYPES, *(f"{m}-scaled" for m in SCALED)]


def merged_model(model_type, rope, task=None):
    overrides = {} if rope is None else {"rope_parameters": json.loads(json.dumps(rope))}
    if rope == SCALED["phi3"]:
        overrides["original_max_position_embeddings"] = 16
    moe = perturb_experts(ummrm.upcycle(tiny_model(model_type, task, **overrides), CONFIG))
    return ummrm.merge(ummrm.prepare_merge(moe))


KEYS = {
    "gpt_neox": {"rotary_emb_base": 777.0, "rotary_pct": 0.75},
    "gemma3_text": {"rope_theta": 777.0, "rope_local_base_freq": 55.0},
    "modernbert": {"global_rope_theta": 777.0, "local_rope_theta": 55.0},
}


@pytest.mark.parametrize(("model_type", "rope"), [in_tier(*case, id=i) for case, i in zip(CASES, IDS, strict=True)])
def test_legacy_rotary_keys_are_written_and_read_back_as_nothing_new(model_type, rope, tmp_path):
    """transformers 4 reads only these; without them it falls back to its default base and scores differently."""
    merged, batch = merged_model(model_type, rope), padded_batch()
    merged.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    if rope is not None:
        usual = {"rope_theta": 777.0} | ({"partial_rotary_factor": 0.75} if model_type in PARTIAL else {})
        expected = KEYS.get(model_type, usual)
        assert {key: written.get(key) for key in expected} == expected
    scaled = (rope or {}).get("full_attention", rope) or {}
    if scaled.get("rope_type", "default") == "default":
        assert written.get("rope_scaling") is None
    else:
        got = {"rope_type": written["rope_scaling"].get("type"), **written["rope_scaling"]}
        left_out = {*usual, *({"original_max_position_embeddings"} if model_type == "phi3" else ())}
        assert {k: got.get(k) for k in scaled if k not in left_out} == {
            k: v for k, v in scaled.items() if k not in left_out
        }
    reloaded = type(merged).from_pretrained(tmp_path)
    if rope is not None:
        now = reloaded.config.rope_parameters
        assert {k: now.get(k) for k in rope} == {k: merged.config.rope_parameters.get(k) for k in rope}
    torch.testing.assert_close(outputs_of(reloaded, batch), outputs_of(merged, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_merged_models_score_the_same_in_transformers_4(tmp_path):
    """Every family: 4.57 has them all. One process for all of them, as its imports take long."""
    assert PYTHON.exists(), "run `make test-full`, which makes the environments of this tier"
    for name, (model_type, rope) in zip(IDS, CASES, strict=True):
        # the one family whose reward model is new in transformers 5
        merged = merged_model(model_type, rope, "ForCausalLM" if model_type == "olmo2" else None)
        merged.save_pretrained(tmp_path / name / "merged")
        batch, kind = padded_batch(), type(merged).__name__
        auto = "AutoModelForSequenceClassification" if "Sequence" in kind else "AutoModelForCausalLM"
        torch.save((auto, batch, outputs_of(merged, batch).detach()), tmp_path / name / "expected.pt")
    script = textwrap.dedent(f"""
        import pathlib, torch, transformers
        assert transformers.__version__.startswith("4.57."), transformers.__version__
        folders = sorted(pathlib.Path({str(tmp_path)!r}).iterdir())
        assert len(folders) == {len(IDS)}
        failures = []
        for folder in folders:
            auto, batch, expected = torch.load(folder / "expected.pt")
            try:
                model, info = getattr(transformers, auto).from_pretrained(
                    folder / "merged", attn_implementation="eager", output_loading_info=True
                )  # its sdpa leaves gemma2's soft cap out
                assert not info["missing_keys"] and not info["unexpected_keys"], info
                with torch.no_grad():
                    logits = model(**batch).logits
                logits = logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits
                torch.testing.assert_close(logits.flatten(), expected[: logits.numel()], rtol=1e-5, atol=1e-5)
            except Exception as error:
                failures.append(f"{{folder.name}}: {{type(error).__name__}}: {{error}}")
        assert not failures, "\\n".join(failures)
    """)
    done = subprocess.run([PYTHON, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
