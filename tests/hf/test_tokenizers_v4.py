"""Tokenizers are saved under names that transformers 4 knows, and transformers 5 reads the same from them.

That 4.57 reads them is shown by the full tier (tests/pipeline/test_stock_readers.py).
"""

import json

import pytest
from transformers import AutoTokenizer, BertTokenizer
from trl_inputs import make_tokenizer

from ummrm.hf.tokenizers_v4 import save_tokenizer


def with_special_tokens():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    return tokenizer


MADE = {"plain": make_tokenizer, "special": with_special_tokens, "bert": BertTokenizer}


@pytest.mark.parametrize("kind", MADE)
def test_what_is_saved_has_the_old_names_and_reads_the_same(kind, tmp_path):
    made = MADE[kind]()
    made.save_pretrained(tmp_path / "own")
    save_tokenizer(made, tmp_path / "ours")
    own, told = (json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("own", "ours"))
    names = {"own": set(own), "ours": set(told)}
    assert told["tokenizer_class"] == ("BertTokenizer" if kind == "bert" else "PreTrainedTokenizerFast")
    exchanged = {"extra_special_tokens", "additional_special_tokens"} if kind == "special" else set()
    assert names["own"] ^ names["ours"] == exchanged | {"model_input_names"}
    assert set(told["model_input_names"]) == set(made("w1"))
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(p.name for p in (tmp_path / "own").iterdir())
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("own", "ours"))
    assert type(ours) is type(theirs) and ours.chat_template == theirs.chat_template
    assert ours.all_special_tokens == theirs.all_special_tokens and ours.get_vocab() == theirs.get_vocab()
    text = "<user> w1 w2 <assistant> w3"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == theirs.decode(
        theirs(text)["input_ids"], skip_special_tokens=True
    )


def test_what_has_no_configuration_of_a_tokenizer_is_saved_as_it_is(tmp_path):
    class Processor:
        def save_pretrained(self, folder):
            (folder / "processor_config.json").write_text("{}")

    save_tokenizer(Processor(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["processor_config.json"]


def test_transformers_still_writes_the_names_that_are_exchanged(tmp_path):
    """Where it no longer does, `ummrm/hf/tokenizers_v4.py` can go."""
    with_special_tokens().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "TokenizersBackend" and told["extra_special_tokens"] == ["<user>", "<assistant>"]
    assert "model_input_names" not in told
