"""Pairs with subsets, both forms of RewardBench, and candidates, read from files; what is left out is counted."""

import json

import pytest
from trl_inputs import message

from ummrm.data import DataError, PairSource
from ummrm.evaluation import read_candidates, read_evaluation_data

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def written(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return PairSource(str(path))


def test_subsets_come_from_a_column_or_from_the_file(tmp_path):
    rows = [{**PAIR, "subset": "x"}, {**PAIR, "prompt": "q", "subset": "y"}, {**PAIR, "prompt": "r"}]
    one = written(tmp_path / "a.jsonl", rows)
    assert [pair.subset for pair in read_evaluation_data([one]).pairs] == ["x", "y", "all"]
    other = written(tmp_path / "b.jsonl", [{**PAIR, "kind": 7}])
    both = read_evaluation_data([one, other])
    assert both.subsets == ["x", "y", one.path, other.path] and len(both.lines()) == 2
    assert read_evaluation_data([other], subset="kind").subsets == ["7"]
    named = read_evaluation_data([written(tmp_path / "c.jsonl", [{**PAIR, "kind": "k"}, PAIR])], subset="kind")
    assert len(named.pairs) == 1 and named.reports[0].problems == {"malformed": 1}
    assert "no column 'kind', which names the subset" in named.lines()[1]


def test_texts_in_full_and_keys_of_prompts(tmp_path):
    chat = {
        "prompt": [message("user", "p")],
        "chosen": [message("assistant", "c")],
        "rejected": [message("assistant", "r")],
    }
    rows = [PAIR, {"chosen": "Long beginning, then c", "rejected": "Long beginning, then r"}, chat, PAIR]
    plain, implicit, conversation, again = read_evaluation_data([written(tmp_path / "a.jsonl", rows)]).pairs
    assert plain.texts == ("pc", "pr") and plain.key == again.key == "p"
    assert implicit.texts[0] == "Long beginning, then c" and implicit.prompt is None
    assert conversation.texts[1] == [message("user", "p"), message("assistant", "r")]
    assert len({plain.key, implicit.key, conversation.key}) == 3


def test_broken_rows_are_counted_and_strict_refuses_them(tmp_path):
    source = written(tmp_path / "a.jsonl", [PAIR, '{"prompt": \n', {**PAIR, "chosen": "r"}, {"chosen": "c"}])
    data = read_evaluation_data([source])
    assert len(data.pairs) == 1 and data.reports[0].problems == {"malformed": 2, "identical": 1}
    assert any("a.jsonl:2" in line for line in data.lines())
    with pytest.raises(DataError, match=r"(?s)3 rows make no pair, and `strict` is set.*a.jsonl:4"):
        read_evaluation_data([source], strict=True)
    with pytest.raises(DataError, match="none of 1 rows does; first .*no column 'chosen'"):
        read_evaluation_data([written(tmp_path / "b.jsonl", [{"question": "a"}])])
    with pytest.raises(ValueError, match="`form` must be one of pairs, rewardbench, rewardbench2, got 'x'"):
        read_evaluation_data([source], form="x")
    with pytest.raises(ValueError, match="at least one file or data set"):
        read_evaluation_data([])


def test_rewardbench_is_known_by_its_columns_and_becomes_conversations(tmp_path):
    row = {**PAIR, "chosen_model": "a", "rejected_model": "b", "subset": "hep-go", "id": 1}
    (pair,) = read_evaluation_data([written(tmp_path / "a.jsonl", [row])]).pairs
    assert pair.benchmark == "rewardbench" and pair.subset == "hep-go"
    assert pair.texts[0] == [message("user", "p"), message("assistant", "c")]
    assert read_evaluation_data([PairSource(str(tmp_path / "a.jsonl"))], form="pairs").pairs[0].texts[0] == "pc"


def test_rewardbench_2(tmp_path):
    rows = [
        {"id": "1", "prompt": "p", "chosen": ["c"], "rejected": ["x", "y", "z"], "subset": "Math"},
        {"id": "tied:1", "prompt": "q", "chosen": ["a", "b"], "rejected": ["x"], "subset": "Ties"},
        {"id": "3", "prompt": "p", "chosen": ["a", "b"], "rejected": ["x"], "subset": "Math"},
        {"id": "4", "prompt": 3, "chosen": ["a"], "rejected": ["x"], "subset": "Math"},
    ]
    data = read_evaluation_data([written(tmp_path / "a.jsonl", rows)])
    math, ties = data.choices
    assert math.texts[0] == [message("user", "p"), message("assistant", "c")] and len(math.texts) == 4
    assert ties.right == ("a", "b") and ties.identity == "tied:1"
    assert [pair.texts[1][-1]["content"] for pair in data.pairs] == ["x", "y", "z"]
    assert len({pair.key for pair in data.pairs}) == 1 and data.subsets == ["Math"]
    reasons = [reason for _, reason in data.reports[0].places["malformed"]]
    assert "2 right answers, which only the subset Ties may have" in reasons[0] and "prompt must be" in reasons[1]
    with pytest.raises(DataError, match="chosen must be a list of texts, as RewardBench 2 has it, got 'c'"):
        read_evaluation_data([written(tmp_path / "b.jsonl", [PAIR])], form="rewardbench2")


def test_candidates(tmp_path):
    rows = [
        {"prompt": "p ", "candidates": ["a", "b"], "gold": [1, 2.5]},
        {"prompt": [message("user", "q")], "candidates": ["a", "b", "c"], "gold": [1, 2, 3]},
        {"prompt": "p", "candidates": ["a"]},
        {"prompt": "p", "candidates": ["a", "b"], "gold": [1]},
        {"prompt": 3, "candidates": ["a", "b"], "gold": [1, 2]},
    ]
    source = written(tmp_path / "a.jsonl", rows)
    found = read_candidates(source, gold_model=False)
    assert found.texts[0] == ["p a", "p b"] and found.gold == [[1.0, 2.5], [1.0, 2.0, 3.0]]
    assert found.texts[1][2] == [message("user", "q"), message("assistant", "c")]
    assert found.report.problems == {"malformed": 3} and "candidates for 2 prompts of 5 rows" in found.lines()[0]
    by_model = read_candidates(PairSource(source.path, as_messages=True), gold_model=True)
    assert by_model.gold is None and len(by_model.texts) == 3
    assert by_model.texts[0][0] == [message("user", "p "), message("assistant", "a")]
    with pytest.raises(DataError, match="must hold candidates, and none of 1 rows does; first .*a list of texts"):
        read_candidates(written(tmp_path / "b.jsonl", [PAIR]), gold_model=True)
