"""The model card of a merged model: true, saved with the weights, and never over someone else's."""

import copy
import gc
import pickle
import re

import pytest
import torch
import yaml
from tiny_models import padded_batch, perturb_experts, tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.hf import card

MATTER = {
    "library_name": "transformers",
    "pipeline_tag": "text-classification",
    "tags": ["reward-model", "ummrm"],
}


def front_matter(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text[4 : text.index("\n---\n", 4)])


def prepared(merge_config=None, base="someone/dense-rm"):
    dense = tiny_model("llama")
    dense.config._name_or_path = base
    config = UpcycleConfig(num_experts=3, num_experts_per_tok=2, num_shared_experts=2)
    moe = ummrm.prepare_merge(perturb_experts(ummrm.upcycle(dense, config)), merge_config)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if name.endswith("alpha"):
                parameter.copy_(torch.randn_like(parameter))
    return moe


@pytest.mark.parametrize("per", ["layer", "projection"])
def test_the_card_says_how_the_model_was_made(per, tmp_path):
    moe = prepared(MergeConfig(shared_share=0.25, alpha_per=per))
    moe.save_pretrained(tmp_path / "merging")  # the base model's name outlives the folders in between
    moe = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merging")
    ummrm.save_pretrained(ummrm.merge(moe, card_notes="## Training\n\n120 pairs"), tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert front_matter(text) == MATTER | {"base_model": "someone/dense-rm", "base_model_relation": "finetune"}
    assert "| shared_share | 0.25 |" in text and "| num_experts | 3 |" in text and "120 pairs" in text
    for name, coefficients in ummrm.merge_coefficients(moe).items():
        rows = [line for line in text.split("\n") if line.startswith(f"| {name} ")]
        wanted = coefficients if per == "projection" else coefficients[:1]
        got = torch.tensor([[float(cell) for cell in row.split("|")[2:-1]] for row in rows])
        torch.testing.assert_close(got, wanted, rtol=0, atol=6e-5)


@pytest.mark.parametrize(
    ("model_type", "head", "tag", "auto"),
    [
        ("llama", "ForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("bert", "ForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        ("llama", "Model", None, "LlamaModel"),
    ],
)
def test_the_card_of_a_model_without_a_reward_head_calls_it_none(model_type, head, tag, auto, tmp_path):
    dense = tiny_model("llama", "ForCausalLM").model if head == "Model" else tiny_model(model_type, head)
    config = UpcycleConfig(num_experts=2, num_experts_per_tok=1)
    merged = ummrm.merge(ummrm.prepare_merge(ummrm.upcycle(dense, config)))
    ummrm.save_pretrained(merged, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert front_matter(text).get("pipeline_tag") == tag and front_matter(text)["tags"] == ["ummrm"]
    assert "reward" not in text.lower().replace("umm-rm", "") and "SequenceClassification" not in text
    snippet = text.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(tmp_path))
    assert f"import {auto}\n" in snippet
    found = {}
    exec(snippet, found)
    assert type(found["model"]) is type(merged)


def test_a_local_base_model_is_named_in_the_text_alone_without_its_folders(tmp_path):
    for base in (str(tmp_path / "dense"), "./dense"):
        ummrm.save_pretrained(ummrm.merge(prepared(base=base)), tmp_path / "merged")
        text = (tmp_path / "merged" / "README.md").read_text()
        assert "base_model:" not in text and "`dense`" in text and str(tmp_path) not in text


def test_someone_elses_card_stays_and_ours_is_renewed(tmp_path):
    merged = ummrm.merge(prepared(), card_notes="first")
    ummrm.save_pretrained(merged, tmp_path / "merged")
    ummrm.save_pretrained(ummrm.merge(prepared(), card_notes="second"), tmp_path / "merged")
    readme = tmp_path / "merged" / "README.md"
    assert "second" in readme.read_text() and "first" not in readme.read_text()
    readme.write_text("my own words")
    ummrm.save_pretrained(merged, tmp_path / "merged")
    assert readme.read_text() == "my own words"


@pytest.mark.parametrize(
    "name",
    [
        "x\n---\n# Mine\nlicense: mit",
        "x\nlicense: mit",
        "someone/rm\r\nlicense: mit\u2028---",
        "a: {b}, [c] # d",
        "`` ` | <script>alert(1)</script> | `\n| a | b |",
        "!!python/object:os.system",
        "-- > -->",
    ],
)
def test_a_strangers_name_says_nothing_but_itself(name, tmp_path):
    """`umm_base_model` stands in a file that came from somewhere; its text must stay text."""
    moe = prepared(base=name)
    assert moe.config.umm_base_model == name
    ummrm.save_pretrained(ummrm.merge(moe), tmp_path)
    text = (tmp_path / "README.md").read_text()
    plain = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert front_matter(text) == MATTER
    ummrm.save_pretrained(ummrm.merge(prepared(base="plain")), tmp_path / "plain")
    other = (tmp_path / "plain" / "README.md").read_text().splitlines()
    header = other[: other.index("---", 1) + 1]
    other = [*(line for line in header if not line.startswith("base_model")), *other[len(header) :]]
    changed = [(ours, theirs) for ours, theirs in zip(text.splitlines(), other, strict=True) if ours != theirs]
    named = [ours for ours, theirs in changed if "`plain`" in theirs]
    assert len(named) == 1 and plain in named[0]
    assert all(ours.startswith("| model.") for ours, theirs in changed if ours not in named)  # merge weights are random
    fence = max(re.findall("`+", named[0].split(plain)[0]), key=len)
    assert fence not in plain, "the code span ends where the name does"


def test_cells_stay_in_their_column():
    table = card.settings_table({"a|b": "c\n| d | e |", "back\\slash": "`<b>`", "link": "[x](http://y)"})
    rows = table.split("\n")
    assert len(rows) == 5 and all(len(re.findall(r"(?<!\\)\|", row.replace("\\\\", ""))) == 3 for row in rows)
    assert r"\`\<b>\`" in table and r"\[x](http://y)" in table


def test_a_merged_model_is_a_stock_object_whose_card_goes_with_it(tmp_path):
    merged, batch = ummrm.merge(prepared()), padded_batch()
    assert "save_pretrained" not in vars(merged) and card.recall(merged).startswith("---")
    assert b"ummrm" not in pickle.dumps(merged), "torch.load of it needs no ummrm"
    for other in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        with torch.no_grad():
            other.score.weight.add_(1)
        ummrm.save_pretrained(other, tmp_path / "copy")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "copy")
        torch.testing.assert_close(loaded(**batch).logits, other(**batch).logits)
        assert not torch.equal(loaded.score.weight, merged.score.weight)
        assert card.recall(other) is None and not (tmp_path / "copy" / "README.md").exists()
    cards = len(card._REMEMBERED)
    del merged
    gc.collect()
    assert len(card._REMEMBERED) < cards
