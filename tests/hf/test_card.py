"""The model card of a merged model: true, saved with the weights, and never over someone else's."""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from tiny_models import padded_batch, perturb_experts, tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import MergeConfig, UpcycleConfig


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
    assert text.startswith("---\nlibrary_name: transformers\n") and "\nbase_model: someone/dense-rm\n" in text
    assert "| shared_share | 0.25 |" in text and "| num_experts | 3 |" in text and "120 pairs" in text
    for name, coefficients in ummrm.merge_coefficients(moe).items():
        rows = [line for line in text.split("\n") if line.startswith(f"| {name} ")]
        wanted = coefficients if per == "projection" else coefficients[:1]
        got = torch.tensor([[float(cell) for cell in row.split("|")[2:-1]] for row in rows])
        torch.testing.assert_close(got, wanted, rtol=0, atol=6e-5)


def test_a_local_base_model_is_named_in_the_text_alone_without_its_folders(tmp_path):
    for base in (str(tmp_path / "dense"), "./dense"):
        ummrm.save_pretrained(ummrm.merge(prepared(base=base)), tmp_path / "merged")
        text = (tmp_path / "merged" / "README.md").read_text()
        assert "base_model:" not in text and "`dense`" in text and str(tmp_path) not in text


def test_someone_elses_card_stays_and_ours_is_renewed(tmp_path):
    merged = ummrm.merge(prepared(), card_notes="first")
    ummrm.save_pretrained(merged, tmp_path / "merged")
    ummrm.save_pretrained(ummrm.merge(prepared(), card_notes="second"), tmp_path / "merged")
    card = tmp_path / "merged" / "README.md"
    assert "second" in card.read_text() and "first" not in card.read_text()
    card.write_text("my own words")
    ummrm.save_pretrained(merged, tmp_path / "merged")
    assert card.read_text() == "my own words"


def test_the_card_is_known_as_long_as_the_model_and_stands_nowhere_on_it(tmp_path):
    merged = ummrm.merge(prepared())
    assert "save_pretrained" not in vars(merged)
    merged.save_pretrained(tmp_path / "plain")  # transformers' own: it knows no card
    assert not (tmp_path / "plain" / "README.md").exists()
    ummrm.save_pretrained(merged, tmp_path / "given", model_card="my own words")
    assert (tmp_path / "given" / "README.md").read_text() == "my own words"
    cards, known = sys.modules["ummrm.merge"]._CARDS, weakref.ref(merged)
    assert merged in cards
    del merged
    gc.collect()
    assert known() is None and known not in cards.keyrefs()


def test_a_merged_model_can_still_be_copied_and_pickled(tmp_path):
    merged, batch = ummrm.merge(prepared()), padded_batch()
    for other in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        with torch.no_grad():
            other.score.weight.add_(1)
        other.save_pretrained(tmp_path / "copy")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "copy")
        torch.testing.assert_close(loaded(**batch).logits, other(**batch).logits)
        assert not torch.equal(loaded.score.weight, merged.score.weight)
