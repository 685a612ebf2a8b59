"""`ummrm evaluate`: what it writes and says, that the output is checked before any work, and what is refused."""

import json

import pytest
from tiny_models import tiny_model
from trl_inputs import make_pairs, make_tokenizer, message

from ummrm.evaluation import RewardScorer

ROWS = [
    {"prompt": p["prompt"] + " ", "chosen": p["chosen"], "rejected": p["rejected"] + " w1", "kind": f"k{i % 2}"}
    for i, p in enumerate(make_pairs(20))
]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folders(models):
    for name in ("dense", "sequence"):
        make_tokenizer().save_pretrained(models / name)
    written(models / "pairs.jsonl", ROWS)
    written(
        models / "candidates.jsonl", [{"prompt": r["prompt"], "candidates": [r["chosen"], r["rejected"]]} for r in ROWS]
    )
    return models


def test_two_models_on_pairs_and_candidates(folders, command):
    options = ["--subset", "kind", "--candidates", "candidates.jsonl", "--gold", "dense", "--probes", "length,praise"]
    done = command("evaluate", "dense", "sequence", "--data", "pairs.jsonl", "--output", "new/report", *options)
    assert done.status == 0, done.err
    result = json.loads((folders / "new/report/evaluation.json").read_text())
    assert list(result["models"]) == ["dense", "sequence"] and result["pairs"] == 20 and result["gold"] == "dense"
    scorer = RewardScorer.load("dense")
    chosen, rejected = (scorer.score([r["prompt"] + r[side] for r in ROWS]).rewards for side in ("chosen", "rejected"))
    dense = result["models"]["dense"]
    assert dense["accuracy"]["share"]["value"] == pytest.approx(((chosen > rejected) + (chosen == rejected) / 2).mean())
    assert set(dense["subsets"]) == {"k0", "k1"} and set(dense["edits"]) == {"praise"}
    assert dense["best_of_n"]["fall"] == 0, "the gold model is never fooled by itself"
    assert "[1/5] reading the data" in done.err and "[5/5] writing new/report" in done.err
    assert "pairs.jsonl: 20 pairs of 20 rows" in done.err and "dense: accuracy " in done.out
    assert done.out.splitlines()[-1].startswith("new/report/report.html (")
    assert (
        "holds evaluation.json already"
        in command("evaluate", "dense", "--data", "pairs.jsonl", "--output", "new/report").err
    )
    (folders / "new/report/notes.txt").write_text("mine")
    more = ["--overwrite", "--probes", "none", "--batch-size", 3, "--max-length", 30]
    again = command("evaluate", "dense", "--data", "pairs.jsonl", "--output", "new/report", *more)
    assert again.status == 0 and (folders / "new/report/notes.txt").read_text() == "mine"
    assert list(json.loads((folders / "new/report/evaluation.json").read_text())["models"]) == ["dense"]


def test_the_example_of_the_help_runs_with_columns_of_other_names(folders, command):
    shown = " ".join(command("evaluate", "--help").out.split())
    assert "Example: ummrm evaluate merged --data pairs.jsonl --output report" in shown
    (folders / "dense").rename("merged")
    rows = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in ROWS] + [{"question": "w1"}]
    written(folders / "pairs.jsonl", rows)
    columns = ["--columns", "prompt=question, chosen=good,rejected=bad", "--probes", "none"]
    done = command("evaluate", "merged", "--data", "pairs.jsonl", "--output", "report", *columns)
    assert done.status == 0 and "1 malformed, left out: pairs.jsonl:21" in done.err, done.err


def test_what_is_refused_before_any_work(folders, refused, monkeypatch):
    monkeypatch.setattr(RewardScorer, "load", lambda *_, **__: pytest.fail("work was begun"))
    tiny_model("llama", num_labels=2).save_pretrained("labels")
    make_tokenizer().save_pretrained("labels")
    bare = make_tokenizer()
    bare.chat_template = None
    bare.save_pretrained("sequence")
    (folders / "sequence/chat_template.jinja").unlink(missing_ok=True)
    chat = {"prompt": [message("user", "w1")], "chosen": [message("assistant", "w2")]}
    written(folders / "chats.jsonl", [{**chat, "rejected": [message("assistant", "w3")]}])
    (folders / "blocked/report.html").mkdir(parents=True)
    for arguments, text in {
        ("dense", "--data", "pairs.jsonl", "--output", ""): "--output must be the name of a folder",
        ("dense", "--data", "pairs.jsonl", "--output", "pairs.jsonl"): "a file stands there",
        ("dense", "--data", "pairs.jsonl", "--output", "/proc/x"): "can't be written",
        (
            "dense",
            "--data",
            "pairs.jsonl",
            "--output",
            "blocked",
        ): "must be a file, and a folder stands there",
        ("dense", "--data", "none.jsonl", "--output", "r"): "'none.jsonl' is not there",
        ("dense", "--data", "candidates.jsonl", "--output", "r"): "none of 20 rows does; first candidates.jsonl:1",
        ("dense", "--data", "chats.jsonl", "--output", "r", "--subset", "x"): "no column 'x', which names the subset",
        ("sequence", "--data", "chats.jsonl", "--output", "r"): "must have a chat template for conversations",
        ("labels", "--data", "pairs.jsonl", "--output", "r"): "has 2 labels",
        ("dense", "dense", "--data", "pairs.jsonl", "--output", "r"): "one is given twice",
        ("dense", "--data", "pairs.jsonl", "--output", "r", "--probes", "lenght"): "`probes` must be names of length",
        ("dense", "--data", "pairs.jsonl", "--output", "r", "--format", "csv"): "`form` must be one of pairs",
        ("dense", "--data", "pairs.jsonl", "--output", "r", "--columns", "a"): "--columns must be of the form",
        ("dense", "--data", "pairs.jsonl", "--output", "r", "--gold", "dense"): "--gold must come with --candidates",
        (
            "dense",
            "sequence",
            "--data",
            "pairs.jsonl",
            "--output",
            "r",
            "--revision",
            "x",
        ): "--revision must be left",
        (
            "dense",
            "--data",
            "pairs.jsonl",
            "--output",
            "r",
            "--candidates",
            "candidates.jsonl",
        ): "gold must be 2",
    }.items():
        assert text in refused("evaluate", *arguments), arguments


def test_a_strict_reading_refuses_a_broken_row(folders, refused):
    written(folders / "pairs.jsonl", [*ROWS, {"prompt": "w1"}])
    line = refused("evaluate", "dense", "--data", "pairs.jsonl", "--output", "r", "--strict")
    assert "1 rows make no pair, and `strict` is set" in line and "pairs.jsonl:21" in line


MARKS = ("\n\nHuman:", "\n\nAssistant:")


def test_rated_dialogues_are_read_as_a_recipe_reads_them(folders, command, refused):
    """One file through three readers: `--answers`, `--scores` and `--turns` are the recipe's own."""
    from ummrm.data import PairsConfig, PairSource, read_pairs

    asked = [f"{MARKS[0]} w{i} w{i + 1}{MARKS[1]}" for i in range(12)]
    rated = [{"one": f"{a} w3", "two": f"{a} w4 w5", "s1": i % 3, "s2": 1} for i, a in enumerate(asked)]
    written(folders / "rated.jsonl", rated)
    said = {"answers": ("one", "two"), "scores": ("s1", "s2"), "turns": MARKS}
    options = ["--answers", "one", "two", "--scores", "s1", "s2", "--turns", *(m.replace("\n", "\\n") for m in MARKS)]
    done = command("evaluate", "dense", "--data", "rated.jsonl", "--output", "r", "--probes", "none", *options)
    assert done.status == 0 and "rated.jsonl: 8 pairs of 12 rows" in done.err, done.err
    read = read_pairs(PairsConfig((PairSource("rated.jsonl", **said),), held_out_share=0.5))
    rows = [*read.train, *read.held_out]
    scorer = RewardScorer.load("dense")
    chosen, rejected = (scorer.score([r["prompt"] + r[side] for r in rows]).rewards for side in ("chosen", "rejected"))
    result = json.loads((folders / "r/evaluation.json").read_text())
    expected = ((chosen > rejected) + (chosen == rejected) / 2).mean()
    assert result["models"]["dense"]["accuracy"]["share"]["value"] == pytest.approx(expected)
    line = refused("evaluate", "dense", "--data", "rated.jsonl", "--output", "q", "--answers", "one", "two")
    assert "`answers` and `scores` must be given together" in line


def test_candidates_are_dialogues_too(folders, command):
    turns = ["--turns", *(mark.replace("\n", "\\n") for mark in MARKS)]
    texts = [{"prompt": f"{MARKS[0]} w{i}{MARKS[1]}", "candidates": [" w1", " w2 w3"]} for i in range(4)]
    written(folders / "c.jsonl", texts)
    written(folders / "p.jsonl", [{"chosen": t["prompt"] + " w1", "rejected": t["prompt"] + " w2"} for t in texts])
    more = ["--candidates", "c.jsonl", "--gold", "dense", "--probes", "none", *turns]
    done = command("evaluate", "dense", "--data", "p.jsonl", "--output", "r", *more)
    assert done.status == 0, done.err
    assert json.loads((folders / "r/evaluation.json").read_text())["models"]["dense"]["best_of_n"]["fall"] == 0
