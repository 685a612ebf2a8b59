"""The whole evaluation of tiny models: its numbers from their rewards, what it says of odd data, JSON and page."""

import itertools
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from trl_inputs import make_pairs, make_tokenizer, message

from ummrm.data import PairSource
from ummrm.evaluation import (
    EvaluationConfig,
    RewardScorer,
    ScoringError,
    evaluate,
    read_candidates,
    read_evaluation_data,
    write_report,
)
from ummrm.evaluation.report import page, summary

ROWS = [
    {"prompt": p["prompt"] + " ", "chosen": p["chosen"], "rejected": p["rejected"] + " w1", "subset": f"s{i % 3}"}
    for i, p in enumerate(make_pairs(36, longest=12))
]


def scorer(seed, name, **options):
    torch.manual_seed(seed)
    return RewardScorer(tiny_model("llama"), make_tokenizer(), name=name, **options)


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return PairSource(str(path))


@pytest.fixture(scope="module")
def models():
    return {"one": scorer(1, "one"), "<b>other</b>": scorer(2, "other")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return read_evaluation_data([written(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)])


@pytest.fixture(scope="module")
def result(models, data, tmp_path_factory):
    rows = [
        {"prompt": row["prompt"], "candidates": [r["chosen"] for r in ROWS[i : i + 5]]}
        for i, row in enumerate(ROWS[:9])
    ]
    candidates = read_candidates(written(tmp_path_factory.mktemp("data") / "c.jsonl", rows), gold_model=True)
    return evaluate(models, data, candidates=candidates, gold=scorer(3, "gold"))


def test_accuracy_is_that_of_a_loop(result, models):
    for name, one in result.models.items():
        rewards = {
            side: models[name].score([row["prompt"] + row[side] for row in ROWS]).rewards
            for side in ("chosen", "rejected")
        }
        points = [1 if c > r else 0.5 if c == r else 0 for c, r in zip(*rewards.values(), strict=True)]
        assert one.accuracy.share.value == pytest.approx(sum(points) / 36) and one.accuracy.ties == points.count(0.5)
        for number in range(3):
            assert one.subsets[f"s{number}"].share.value == pytest.approx(sum(points[number::3]) / 12)
        assert one.subset_mean == pytest.approx(np.mean([s.share.value for s in one.subsets.values()]))
        both = np.stack(list(rewards.values()))
        assert (one.mean, one.std) == pytest.approx((both.mean(), both.std()), rel=1e-6)
        assert one.calibration.all.count == 36 and one.length.longer_chosen.count <= 36
        assert one.edits["praise"].edited == 72 and one.edits["list"] is None, "no answer here has two sentences"


def test_an_edits_effect_is_that_of_the_edited_text(result, models):
    from ummrm.evaluation.edits import PROBES, edited

    probe = next(p for p in PROBES if p.name == "praise")
    before = models["one"].score([ROWS[0]["prompt"] + ROWS[0]["chosen"]]).rewards[0]
    after = models["one"].score([ROWS[0]["prompt"] + edited(ROWS[0]["chosen"], probe, 0)]).rewards[0]
    change = result.models["one"].edits["praise"].changes[0]
    assert change == pytest.approx((after - before) / result.models["one"].std, abs=1e-4) and abs(change) > 1e-3


def test_best_of_n_and_comparison_are_there(result):
    assert result.gold == "gold" and result.models["one"].best_of_n.n == [1, 2, 4, 5]
    (comparison,) = result.comparisons
    assert (comparison.first, comparison.second) == ("one", "<b>other</b>")
    difference = result.models["one"].accuracy.share.value - result.models["<b>other</b>"].accuracy.share.value
    assert comparison.paired.difference.value == pytest.approx(difference)


def test_json_holds_the_numbers_and_no_nan(result, tmp_path):
    files = write_report(result, tmp_path / "new" / "report")
    plain = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(name))
    one = plain["models"]["one"]
    assert one["accuracy"]["share"]["value"] == result.models["one"].accuracy.share.value
    assert "changes" not in one["edits"]["praise"] and one["edits"]["list"] is None
    assert plain["config"]["probe_pairs"] == 500 and plain["pairs"] == 36
    assert [path.name for path in files] == ["evaluation.json", "report.html"]
    assert len(list((tmp_path / "new" / "report").iterdir())) == 2, "nothing is left beside them"


class _Page(HTMLParser):
    VOID = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") or name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_well_formed(result):
    html = page(result)
    parsed = _Page()
    parsed.feed(html)
    assert parsed.open == [] and len(parsed.ids) == len(set(parsed.ids)), "ids of figures must not meet"
    assert "script" not in parsed.tags and all(link.startswith("#") for link in parsed.links), parsed.links
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(parsed.ids), "a clip path that is not there hides a line"
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "<b>other" not in html and "&lt;b&gt;other" in html, "a model's name is text"
    assert "prefers-color-scheme: dark" in html and "currentColor" in html and "#012345" not in html
    assert 'name="viewport"' in html
    assert html.count("<figure") == parsed.tags.count("svg") == 10 and parsed.tags.count("table") == 7
    assert page(result) == html, "the same results make the same page"
    assert any(line.startswith("one: accuracy ") for line in summary(result))


def test_one_pair_makes_a_report(models, tmp_path):
    data = read_evaluation_data([written(tmp_path / "a.jsonl", ROWS[:1])])
    result = evaluate({"one": models["one"]}, data)
    assert result.models["one"].accuracy.share.count == 1 and result.comparisons == []
    assert math.isnan(result.models["one"].edits["praise"].change.low)
    write_report(result, tmp_path)
    assert "1 pair of 1 prompt." in (tmp_path / "report.html").read_text()


def test_a_model_that_says_the_same_of_everything(data, tmp_path):
    flat = scorer(4, "flat")
    torch.nn.init.zeros_(flat.model.score.weight)
    result = evaluate({"flat": flat, "one": scorer(1, "one")}, data)
    one = result.models["flat"]
    assert one.accuracy.share.value == 0.5 and one.accuracy.ties == 36
    assert one.length is None and one.edits["praise"] is None and one.calibration.temperature is None
    assert any("flat: equal rewards in 36 pairs, which count half" in note for note in result.notes)
    assert any("flat: all rewards are equal" in note for note in result.notes)
    assert any(note.startswith("Texts a second do not compare the models") for note in result.notes)
    write_report(result, tmp_path)


def test_rewards_that_are_no_numbers_are_an_error(data):
    broken = scorer(5, "broken")
    torch.nn.init.constant_(broken.model.score.weight, math.nan)
    with pytest.raises(ScoringError, match=r"must give finite rewards, and broken gives NaN or infinity for \d+ of"):
        evaluate({"broken": broken}, data, EvaluationConfig(probes=()))


def test_long_texts_are_cut_or_dropped_and_always_said(tmp_path):
    rows = [*ROWS[:10], {"prompt": "w1 ", "chosen": "w2 " * 40, "rejected": "w3"}]
    data = read_evaluation_data([written(tmp_path / "a.jsonl", rows)])
    model = {"short": scorer(1, "short", max_length=30)}
    cut = evaluate(model, data, EvaluationConfig(probes=("praise",)))
    assert cut.pairs == 11 and cut.models["short"].cut_pairs == 1 and cut.dropped == 0
    assert any("longer than 30 tokens and are scored by what is within" in note for note in cut.notes)
    assert "short: 1 pair with a text that is cut." in cut.notes
    assert cut.models["short"].edits["praise"].left_out >= 1, "where the end is cut off, so is the praise"
    dropped = evaluate(model, data, EvaluationConfig(probes=(), too_long="drop"))
    assert (
        dropped.pairs == 10
        and dropped.dropped == 1
        and "1 pair with a text over a model's limit left out" in dropped.notes[0]
    )
    with pytest.raises(ValueError, match="`too_long` must leave some pairs"):
        evaluate({"tiny": scorer(1, "tiny", max_length=1)}, data, EvaluationConfig(probes=(), too_long="drop"))


def test_benchmarks_on_disk_make_their_scores(models, tmp_path):
    first = [
        {**row, "subset": ["hep-go", "math-prm"][i % 2], "chosen_model": "a", "rejected_model": "b"}
        for i, row in enumerate(ROWS[:8])
    ]
    second = [
        {
            "id": str(i),
            "prompt": row["prompt"],
            "chosen": [row["chosen"]],
            "rejected": [r["rejected"] for r in ROWS[i : i + 3]],
        }
        | {"subset": "Focus"}
        for i, row in enumerate(ROWS[8:14])
    ]
    sources = [written(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((first, second))]
    result = evaluate({"one": models["one"]}, read_evaluation_data(sources), EvaluationConfig(probes=()))
    one, two = result.models["one"].benchmarks
    chats = [
        [[message("user", row["prompt"]), message("assistant", row[s])] for row in first]
        for s in ("chosen", "rejected")
    ]
    right = models["one"].score(chats[0]).rewards > models["one"].score(chats[1]).rewards
    assert one.parts["hep-go"].value == right[::2].mean() and one.parts["math-prm"].value == right[1::2].mean()
    best = 0
    for row in second:
        texts = [[message("user", row["prompt"]), message("assistant", a)] for a in row["chosen"] + row["rejected"]]
        best += int(np.argmax(models["one"].score(texts).rewards) == 0)
    assert two.parts["Focus"].value == pytest.approx(best / 6) and result.pairs == 8 + 18 and result.prompts == 14
    assert not any("chat template" in note or "Texts a second" in note for note in result.notes)
    plain = scorer(1, "plain", flatten=True, max_length=12)
    plain.tokenizer.chat_template = None
    flat = evaluate({"plain": plain}, read_evaluation_data(sources[:1]), EvaluationConfig(probes=()))
    assert any("plain: its tokenizer has no chat template; 16 conversations scored as text" in n for n in flat.notes)
    html = page(result)
    assert "<h2>RewardBench</h2>" in html and "<h2>RewardBench 2</h2>" in html


def test_models_are_loaded_when_their_turn_comes(data):
    order = []

    def load(seed):
        def make():
            order.append(seed)
            return scorer(seed, str(seed))

        return make

    evaluate({"a": load(1), "b": load(2)}, data, EvaluationConfig(probes=()), progress=lambda name: order.append(name))
    assert order == ["a", "b"] or order == [1, "a", 2, "b"] or order == ["a", 1, "b", 2]


def test_mistakes_are_clear(models, data):
    for fields, message_ in (
        ({"too_long": "keep"}, "`too_long` must be one of cut, drop, got 'keep'"),
        ({"probes": ("lenght",)}, r"`probes` must be names of length, .*, got \('lenght',\)"),
        ({"probe_pairs": 0}, "`probe_pairs` must be an integer of at least 1, got 0"),
        ({"seed": -1}, "`seed` must be an integer, at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message_):
            EvaluationConfig(**fields)
    with pytest.raises(ValueError, match="`models` must hold at least one"):
        evaluate({}, data)
    with pytest.raises(ValueError, match="`gold` must be given where, and only where"):
        evaluate({"one": models["one"]}, data, gold=models["one"])


def test_the_head_compares_with_the_first_model_alone():
    """Of three models there are three comparisons: two in sentences, all of them in the table."""
    agreement = SimpleNamespace(value=0.9, low=0.8, high=0.95)

    def compared(first, second):
        return SimpleNamespace(first=first, second=second, better=None, agreement=agreement, adjusted_p=1.0)

    names = ("dense", "mixture", "merged")
    models = {name: SimpleNamespace(accuracy=None, benchmarks=(), best_of_n=None) for name in names}
    comparisons = [compared(a, b) for a, b in itertools.combinations(names, 2)]
    said = summary(SimpleNamespace(models=models, comparisons=comparisons, pairs=5))
    assert len(said) == 2 and all(one.startswith("dense and ") for one in said)
