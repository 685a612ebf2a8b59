"""Preference pairs from files: every format, every way that a row can say a pair, what makes none, and the split."""

import csv
import gzip
import json
import random

import datasets
import pytest

from ummrm.data import DataError, PairsConfig, PairSource, read_pairs

TEXTS = [{"prompt": f"question {i}?", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(40)]


def written(path, rows):
    """A file of rows in the format that its name says."""
    opened = gzip.open if path.suffix == ".gz" else open
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        return str(path)
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        elif kind == "json":
            json.dump(rows, file)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def read(path, tmp_path=None, held_out=(), **settings):
    """The data of one source."""
    fields = {name: settings.pop(name) for name in list(settings) if name in PairSource.__dataclass_fields__}
    limits = {name: settings.pop(name) for name in ("length", "max_length") if name in settings}
    return read_pairs(PairsConfig(PairSource(path, **fields), held_out, **settings), **limits)


def all_rows(data):
    return sorted([*data.train.to_list(), *data.held_out.to_list()], key=json.dumps)


def one(tmp_path, *rows, **settings):
    """What becomes of rows beside forty sound ones; and the first place and reason of each kind of problem."""
    path = written(tmp_path / "pairs.jsonl", [*rows, *TEXTS])
    data = read(path, **settings)
    sound = {json.dumps(row, sort_keys=True) for row in TEXTS}
    new = [row for row in all_rows(data) if json.dumps(row, sort_keys=True) not in sound]
    return new, data.report.train[0]


@pytest.mark.parametrize(
    "name", ["p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet", "p.jsonl.gz", "p.csv.gz", "folder", "data set"]
)
def test_every_format_gives_the_same_pairs_at_the_same_places(name, tmp_path):
    rows = [*TEXTS[:20], {**TEXTS[20], "rejected": TEXTS[20]["chosen"]}, *TEXTS[21:]]
    if name == "data set":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
        path, place = str(tmp_path / "set"), f"{tmp_path / 'set'}, row 21"
    elif name == "folder":
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "README.md").write_text("no pairs")
        written(tmp_path / "set" / "a.jsonl", rows[:10])
        written(tmp_path / "set" / "b.csv", rows[10:])
        path, place = str(tmp_path / "set"), f"{tmp_path / 'set' / 'b.csv'}:12"
    else:
        path = written(tmp_path / name, rows)
        line = {"jsonl": ":21", "csv": ":22", "tsv": ":22"}.get(name.split(".")[1], ", row 21")
        place = path + line
    data = read(path)
    assert all_rows(data) == sorted([*rows[:20], *rows[21:]], key=json.dumps)
    report = data.report.train[0]
    assert (report.rows, report.pairs, report.problems) == (40, 39, {"identical": 1})
    assert str(report.places["identical"][0][0]) == place


def test_csv_records_over_several_lines_keep_their_place(tmp_path):
    rows = [{"prompt": "a\nb\nc", "chosen": " x\ny", "rejected": " z"}, {**TEXTS[1], "rejected": ""}, *TEXTS[2:]]
    path = written(tmp_path / "p.csv", rows)
    data = read(path)
    assert {"prompt": "a\nb\nc", "chosen": " x\ny", "rejected": " z"} in all_rows(data)
    ((place, reason),) = data.report.train[0].places["empty"]
    assert (str(place), reason) == (f"{path}:6", "rejected is empty")


def test_broken_lines_are_counted_and_named(tmp_path):
    path = tmp_path / "p.jsonl"
    sound = [json.dumps(row).encode() for row in TEXTS]
    lines = [b'{"prompt": "a', b"\xff\xfe", b"[1, 2]", b"", b'{"chosen": "only"}', b"null", b"[" * 20_000, *sound]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    data = read(str(path))
    report = data.report.train[0]
    assert (report.rows, report.pairs, report.problems["malformed"]) == (46, 40, 6)
    assert [place.number for place, _ in report.places["malformed"]] == [1, 2, 3, 5, 6]
    reasons = [reason for _, reason in report.places["malformed"]]
    assert "no JSON" in reasons[0] and reasons[1] == "not UTF-8 (byte 1)" and "got a list" in reasons[2]
    assert "no column 'rejected'" in reasons[3] and "it has chosen" in reasons[3]
    assert any("6 malformed, left out" in line and line.endswith("; ...") for line in data.report.lines())
    with pytest.raises(DataError, match=r"(?s)6 rows make no pair, and `strict` is set.*p.jsonl:3 \(must be an obj"):
        read(str(path), strict=True)


CHAT = [{"role": "user", "content": "hi"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))


@pytest.mark.parametrize(
    ("row", "settings", "wanted"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, {}, {"prompt": "p", "chosen": "c", "rejected": "r"}),
        (
            {"q": {"text": "p"}, "a": "c", "b": "r"},
            {"columns": {"prompt": "q.text", "chosen": "a", "rejected": "b"}},
            None,
        ),
        ({"prompt": "p", "x": "r", "y": "c", "s": 1, "t": 2.5}, {"answers": ("x", "y"), "scores": ("s", "t")}, None),
        ({"prompt": "p", "x": "c", "y": "r", "s": "3", "t": "-1"}, {"answers": ("x", "y"), "scores": ("s", "t")}, None),
    ],
)
def test_ways_to_say_a_pair_of_texts(row, settings, wanted, tmp_path):
    path = written(
        tmp_path / "p.jsonl", [row, {**row, **{k: "other" for k in row if k in ("prompt",)}, "q": {"text": "o"}}]
    )
    data = read(path, **settings)
    wanted = wanted or {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert wanted in all_rows(data)


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": CHAT, "chosen": YES, "rejected": NO}, {}),
        ({"chosen": CHAT + YES, "rejected": CHAT + NO}, {}),
        ({"prompt": "hi", "chosen": CHAT + YES, "rejected": CHAT + NO}, {}),  # as UltraFeedback has it
        ({"prompt": "hi", "chosen": YES, "rejected": NO}, {}),
        ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, {"as_messages": True}),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}, "turns"),
        ({"prompt": "\n\nHuman: hi", "chosen": "\n\nAssistant: yes", "rejected": "\n\nAssistant: no"}, "turns"),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None}],
                "chosen": YES,
                "rejected": NO,
            },
            {},
        ),
    ],
)
def test_ways_to_say_a_conversation(row, settings, tmp_path):
    settings = {"turns": ("\n\nHuman:", "\n\nAssistant:")} if settings == "turns" else settings
    other = json.loads(json.dumps(row).replace("hi", "ho"))
    data = read(written(tmp_path / "p.jsonl", [row, other]), **settings)
    assert {"prompt": CHAT, "chosen": YES, "rejected": NO} in all_rows(data) and len(all_rows(data)) == 2


def test_a_dialogue_of_several_turns_and_a_system_text(tmp_path):
    begin = "Be kind.\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye"
    rows = [{"chosen": f"{begin} {i}\n\nAssistant: bye", "rejected": f"{begin} {i}\n\nAssistant: no"} for i in range(2)]
    data = read(written(tmp_path / "p.jsonl", rows), turns=("\n\nHuman:", "\n\nAssistant:"))
    assert [m["role"] for m in data.train[0]["prompt"]] == ["system", "user", "assistant", "user"]
    assert data.train[0]["prompt"][0]["content"] == "Be kind." and data.train[0]["chosen"][0]["content"] == "bye"


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "identical", "the same"),
        ({"prompt": "p", "chosen": " \n", "rejected": "c"}, "empty", "chosen is empty"),
        (
            {"prompt": "p", "chosen": 3, "rejected": "c"},
            "malformed",
            "chosen must be text or a list of messages, got 3",
        ),
        ({"prompt": "p", "chosen": YES, "rejected": "c"}, "malformed", "both be text or both be messages"),
        ({"prompt": CHAT, "chosen": "c", "rejected": "d"}, "malformed", "the prompt is messages"),
        ({"prompt": "p", "chosen": "c", "rejected": None}, "empty", "rejected is empty"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": -1}, "malformed", "margin must be 0 or more"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "much"}, "malformed", "margin must be a number"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": True}, "malformed", "a finite number"),
        (
            {"prompt": "p", "chosen": [{"role": "bot", "content": "x"}], "rejected": NO},
            "malformed",
            "role of a message",
        ),
        ({"prompt": "p", "chosen": [{"content": "x"}], "rejected": NO}, "malformed", "must have role and content"),
        ({"chosen": CHAT + YES, "rejected": CHAT + YES}, "identical", "the same"),
        ({"chosen": CHAT + YES, "rejected": CHAT}, "empty", "rejected is empty"),
        ({"prompt": "other", "chosen": CHAT + YES, "rejected": CHAT + NO}, "malformed", "do not begin with it"),
        (
            {"prompt": "p", "chosen": [{**YES[0], "tool_calls": [1]}], "rejected": NO},
            "malformed",
            "tool calls, which are not read",
        ),
    ],
)
def test_rows_that_make_no_pair(row, kind, reason, tmp_path):
    new, report = one(tmp_path, row)
    assert new == [] and report.problems == {kind: 1}
    ((place, why),) = report.places[kind]
    assert place.number == 1 and reason in why


def test_equal_scores_make_no_pair(tmp_path):
    rows = [{"x": f"a{i}", "y": f"b{i}", "s": i % 2, "t": 0} for i in range(8)]
    data = read(written(tmp_path / "p.jsonl", rows), answers=("x", "y"), scores=("s", "t"))
    assert data.report.train[0].problems == {"tied": 4} and len(all_rows(data)) == 4


def test_margins(tmp_path):
    new, report = one(tmp_path, {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1.5})
    assert report.problems == {} and all(row["margin"] in (0.0, 1.5) for row in new) and len(new) == 41


def test_prompts_are_put_in_front_where_not_every_pair_has_one(tmp_path):
    rows = [
        *TEXTS,
        {"chosen": "Long enough a question, is it not? Yes.", "rejected": "Long enough a question, is it not? No."},
    ]
    data = read(written(tmp_path / "p.jsonl", rows))
    assert data.train.column_names == ["chosen", "rejected"] == data.held_out.column_names
    assert "question 3? good 3" in {row["chosen"] for row in all_rows(data)}


def test_long_pairs_are_counted(tmp_path):
    long = {"prompt": "p", "chosen": " w" * 50, "rejected": " w"}
    new, report = one(tmp_path, long, length=lambda texts: [len(t.split()) for t in texts], max_length=20)
    assert new == [] and report.problems == {"long": 1} and "51 tokens, at most 20" in report.places["long"][0][1]


# ---- the split -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False])
def test_no_prompt_stands_on_both_sides(explicit, tmp_path):
    numbers = random.Random(0)
    rows = []
    for i in range(60):
        question = f"What would you say about the thing that has the number {i}? "
        for j in range(numbers.randint(1, 5)):
            both = {"chosen": f"I think it is well {j}", "rejected": f"I think it is bad {j}"}
            answers = both if explicit else {name: question + text for name, text in both.items()}
            rows.append({"prompt": question, **answers} if explicit else answers)
    numbers.shuffle(rows)
    path = written(tmp_path / "p.jsonl", rows)
    data = read(path, held_out_share=0.2)

    def numbers_of(side):
        return {row["prompt" if explicit else "chosen"].split("number ")[1].split("?")[0] for row in side}

    assert not numbers_of(data.train) & numbers_of(data.held_out)
    assert abs(len(data.held_out) - 0.2 * len(rows)) <= 3 and data.report.split
    assert len(data.train) + len(data.held_out) == len(rows)
    again = read(written(tmp_path / "q.jsonl", rows[::-1]), held_out_share=0.2)
    assert numbers_of(again.held_out) == numbers_of(data.held_out)
    other = read(path, held_out_share=0.2, seed=1)
    assert numbers_of(other.held_out) != numbers_of(data.held_out)


def test_a_given_held_out_set_stays_and_its_overlap_is_said(tmp_path):
    held_out = written(tmp_path / "h.jsonl", [TEXTS[0], {"prompt": "new", "chosen": "a", "rejected": "b"}])
    data = read(written(tmp_path / "p.jsonl", TEXTS), held_out=held_out)
    assert len(data.held_out) == 2 and len(data.train) == 40 and data.report.on_both_sides == 1
    assert any("have a prompt of the training pairs" in line for line in data.report.lines())


def test_repeated_and_contradicting_pairs_are_said(tmp_path):
    turned = {"prompt": TEXTS[2]["prompt"], "chosen": TEXTS[2]["rejected"], "rejected": TEXTS[2]["chosen"]}
    data = read(written(tmp_path / "p.jsonl", [*TEXTS, TEXTS[1], turned]))
    assert (data.report.repeated, data.report.contradicting) == (1, 2)
    assert data.report.to_dict()["train"][0]["pairs"] == 42


def test_weights(tmp_path):
    one, two = written(tmp_path / "1.jsonl", TEXTS[:20]), written(tmp_path / "2.jsonl", TEXTS[20:])
    config = PairsConfig((PairSource(one, weight=2), PairSource(two, weight=0.5)), held_out_share=0.1)
    data = read_pairs(config)
    counts = {}
    for row in data.train:
        counts[row["prompt"]] = counts.get(row["prompt"], 0) + 1
    held = {row["prompt"] for row in data.held_out}
    first = {row["prompt"] for row in TEXTS[:20]} - held
    assert all(counts[prompt] == 2 for prompt in first)
    rest = [counts.get(row["prompt"], 0) for row in TEXTS[20:] if row["prompt"] not in held]
    assert set(rest) == {0, 1} and 3 <= sum(rest) <= 15 and len(data.held_out) == 4
    assert read_pairs(config).train.to_list() == data.train.to_list()


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: read("nowhere.jsonl"), "`path` must be a file of pairs, and 'nowhere.jsonl' is not there"),
        (lambda p: read(str(p / "*.csv")), r"`path` must be a pattern that fits files, and none fits .*\*\.csv"),
        (lambda p: read(str(p / "empty")), "`path` must be a folder with files of .jsonl, .*none"),
        (lambda p: read(str(p / "notes.txt")), r"`path` must be a file of .*, got '.*notes.txt'"),
        (lambda p: read(str(p / "cut.parquet")), "cut.parquet must be a Parquet file"),
        (lambda p: read(str(p / "object.json")), "must hold a list of rows, got an object"),
        (lambda p: read(str(p / "cut.json")), r"must hold JSON: .*JSON lines the name ends in \.jsonl"),
        (lambda p: read(str(p / "cut.jsonl.gz")), "cut.jsonl.gz can't be read"),
        (lambda p: read(str(p / "same.jsonl")), "all 2 pairs have the same; give `held_out`"),
        (lambda p: read(str(p / "mixed.jsonl")), r"mixed.jsonl:1 is text, .*mixed.jsonl:2 a conversation; `turns`"),
        (
            lambda p: read(str(p / "other.jsonl")),
            r"none of 1,000 rows does; first .*other.jsonl:1: no column 'chosen'",
        ),
        (lambda p: PairSource("x", weight=0), "PairSource: `weight` must be above 0"),
        (lambda p: PairSource("x", answers=("a", "b")), "`answers` and `scores` must be given together"),
        (lambda p: PairSource("x", columns={"answer": "b"}), "`columns` must be a mapping from prompt"),
        (lambda p: PairSource.of({"path": "x", "colums": {}}), "must have the fields path, .*, got colums"),
        (lambda p: PairsConfig(()), "`train` must be at least one source"),
        (lambda p: PairsConfig("x", held_out_share=1), "`held_out_share` must be above 0 and below 1, got 1"),
    ],
)
def test_mistakes_are_clear(make, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "cut.json").write_text('[{"a": 1}')
    written(tmp_path / "whole.jsonl.gz", TEXTS)
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "whole.jsonl.gz").read_bytes()[:60])
    written(tmp_path / "same.jsonl", [{**TEXTS[0], "chosen": f"c{i}"} for i in range(2)])
    written(tmp_path / "mixed.jsonl", [TEXTS[0], {"prompt": CHAT, "chosen": YES, "rejected": NO}])
    written(tmp_path / "other.jsonl", [{"question": "q", "answer": "a"}] * 2000)
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_data_set_that_is_not_there_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(
        DataError, match="`path` must be a file or folder that is there, or a data set .*'someone/pairs'"
    ):
        read("someone/pairs")
