"""`ummrm score`: rewards in the order of the lines, broken lines by number, and what is refused."""

import gzip
import io
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification
from trl_inputs import make_pairs, make_tokenizer

from ummrm.cli import score
from ummrm.data import rows

TEXTS = [f"{p['prompt']} {p['chosen']}" for p in make_pairs(11, longest=15)]


@pytest.fixture
def folders(models):
    for name in ("dense", "sequence", "moe"):
        make_tokenizer().save_pretrained(models / name)
    (models / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return models


def plain_loop(folder):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), make_tokenizer()
    with torch.no_grad():
        return [model(**tokenizer(t + "<eos>", return_tensors="pt")).logits.item() for t in TEXTS]


def lines(done):
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_rewards_are_those_of_a_plain_loop_in_the_order_of_the_lines(folders, command, monkeypatch):
    monkeypatch.setattr(score, "_BATCHES", 2)  # windows of 4 lines
    found = lines(done := command("score", "dense", "texts.jsonl", "--batch-size", 2))
    assert [row["line"] for row in found] == list(range(1, 12)) and set(found[0]) == {"line", "reward"}
    np.testing.assert_allclose([row["reward"] for row in found], plain_loop("dense"), rtol=1e-5, atol=1e-5)
    assert "11 texts in " in done.err and "%" not in done.err


def test_text_from_standard_input_and_a_compressed_file(folders, command, monkeypatch):
    known = lines(command("score", "dense", "texts.jsonl"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
    assert lines(command("score", "dense", "--text")) == known
    with gzip.open("texts.jsonl.gz", "wb") as file:
        file.write(b"\xef\xbb\xbf" + (folders / "texts.jsonl").read_bytes())
    assert lines(command("score", "dense", "texts.jsonl.gz")) == known
    (folders / "cut.jsonl.gz").write_bytes((folders / "texts.jsonl.gz").read_bytes()[:-20])
    assert "can't be read" in command("score", "dense", "cut.jsonl.gz").err


def test_members_and_their_spread(folders, command):
    found = lines(command("score", "sequence", "texts.jsonl", "--members"))
    assert all(len(row["members"]) == 3 for row in found)
    np.testing.assert_allclose([row["reward"] for row in found], [np.mean(row["members"]) for row in found])
    np.testing.assert_allclose([row["spread"] for row in found], [np.std(row["members"]) for row in found])
    np.testing.assert_allclose([row["reward"] for row in found], plain_loop("sequence"), rtol=1e-5, atol=1e-5)


BROKEN = [b'{"text": "w1 w2"}', b"", b'{"text": ', b"\xff\xfe", b'{"text": "w3"}', b'{"prompt": "w1"}']


def test_a_broken_line_ends_the_command_behind_the_lines_before_it(folders, command):
    (folders / "broken.jsonl").write_bytes(b"\n".join(BROKEN))
    done = command("score", "dense", "broken.jsonl")
    assert done.status == 2 and [json.loads(line)["line"] for line in done.out.splitlines()] == [1]
    assert "error: broken.jsonl:3: no JSON" in done.err and done.err.rstrip().endswith("or give --keep-going.")


def test_keep_going_gives_null_and_counts(folders, command, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_LINE", 40)
    long = b'{"text": "' + b"w1 " * 50 + b'"}'
    (folders / "broken.jsonl").write_bytes(b"\n".join([*BROKEN, long, b'{"text": "w3"}']))
    found = lines(done := command("score", "dense", "broken.jsonl", "--keep-going"))
    assert [row["line"] for row in found] == [1, 3, 4, 5, 6, 7, 8], "a blank line is passed over"
    assert [row["reward"] is None for row in found] == [False, True, True, False, True, True, False]
    assert found[3]["reward"] == found[6]["reward"] and "4 lines are broken and got null" in done.err


def test_a_text_that_the_tokenizer_refuses_takes_no_other_with_it(folders, command, monkeypatch):
    known = [row["reward"] for row in lines(command("score", "dense", "texts.jsonl"))]
    monkeypatch.setattr(score, "_TOGETHER", 4)
    texts = [*TEXTS[:6], "\ud800", *TEXTS[6:]]  # a half of a character, which JSON can hold
    (folders / "half.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = [row["reward"] for row in lines(command("score", "dense", "half.jsonl", "--keep-going"))]
    assert found.pop(6) is None
    np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-5)


def test_a_long_text_is_cut_marked_and_counted(folders, command):
    (folders / "long.jsonl").write_text('{"text": "w1 w2 w3 w4 w5"}\n{"text": "w1 w2 w3"}\n')
    long, short = lines(done := command("score", "dense", "long.jsonl", "--max-length", 4))
    assert long["cut"] is True and "cut" not in short and long["reward"] == pytest.approx(short["reward"], abs=1e-6)
    assert "warning: 1 texts are longer than 4 tokens and were cut there." in done.err


def test_rewards_that_are_no_numbers(folders, command):
    weights = load_file("dense/model.safetensors")
    name = next(name for name in weights if "score" in name)
    weights[name].fill_(float("nan"))
    save_file(weights, "dense/model.safetensors", {"format": "pt"})
    done = command("score", "dense", "texts.jsonl")
    assert done.status == 2 and done.out == "" and "texts.jsonl:1: the model's reward is nan; score with" in done.err
    assert [row["reward"] for row in lines(command("score", "dense", "texts.jsonl", "--keep-going"))] == [None] * 11


def test_what_is_refused(folders, refused):
    tiny_model("llama", "ForCausalLM").save_pretrained("causal")
    tiny_model("llama", num_labels=2).save_pretrained("labels")
    tiny_model("llama").save_pretrained("bare")
    for arguments, message in {
        ("dense", "nowhere.jsonl"): "FILE must be a file, and 'nowhere.jsonl' is not there",
        ("dense", "moe"): "'moe' is none",
        ("none", "texts.jsonl"): "there is no folder 'none'",
        ("causal", "texts.jsonl"): "has no reward head: it is a LlamaForCausalLM",
        ("labels", "texts.jsonl"): "must give one reward per sequence, and has 2 labels",
        ("bare", "texts.jsonl"): "has no tokenizer beside its weights",
        ("dense", "texts.jsonl", "--members"): "`members` must be False for dense, which has none",
        ("dense", "texts.jsonl", "--batch-size", 0): "`--batch-size` must be at least 1, got 0",
        ("dense", "texts.jsonl", "--dtype", "int8"): "`--dtype` must be one of",
        ("dense", "texts.jsonl", "--device", "tpu"): "`--device` must be cpu",
        ("dense", "texts.jsonl", "--revision", "main"): "--revision must be left out for a folder, which has none",
    }.items():
        assert message in refused("score", *arguments), arguments


def test_a_model_with_code_of_its_own_needs_permission(folders, refused):
    config = json.loads((folders / "dense/config.json").read_text())
    own = {**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folders / "dense/config.json").write_text(json.dumps(own))
    assert "comes with code of its own; give --trust-remote-code" in refused("score", "dense", "texts.jsonl")


def test_the_example_of_the_help_runs(folders, command, monkeypatch):
    shown = " ".join(command("score", "--help").out.split())
    assert "Example: ummrm score merged answers.jsonl > rewards.jsonl" in shown
    (folders / "dense").rename("merged")
    (folders / "texts.jsonl").rename("answers.jsonl")
    assert len(lines(command("score", "merged", "answers.jsonl"))) == 11


def test_a_revision_of_the_hub_is_what_is_read(folders, command, monkeypatch):
    from huggingface_hub import constants
    from test_cli import make_hub_copy

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folders / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    make_hub_copy(folders / "cache", "some/model", folders / "dense")
    (folders / "cache/models--some--model/refs/main").rename(folders / "cache/models--some--model/refs/older")
    assert lines(command("score", "some/model", "texts.jsonl", "--revision", "older"))
    done = command("score", "some/model", "texts.jsonl")
    assert done.status == 2 and "there is no folder 'some/model'" in done.err


CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
DIALOGUE = "\n\nHuman: w1 w2\n\nAssistant: w3"
MARKS = ["--turns", r"\n\nHuman:", r"\n\nAssistant:"]


def test_every_format_of_training_data_is_scored(folders, command):
    import datasets

    texts = [{"prompt": f"w{i} ", "response": f"w{i + 1} w2"} for i in range(5)]
    (folders / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folders / "t.json").write_text(json.dumps(texts))
    (folders / "t.csv").write_text("prompt,response\n" + "".join(f"{r['prompt']},{r['response']}\n" for r in texts))
    datasets.Dataset.from_list(texts).to_parquet("t.parquet")
    found = {name: lines(command("score", "dense", name)) for name in ("t.jsonl", "t.json", "t.csv", "t.parquet")}
    assert len(found["t.jsonl"]) == 5 and [row["line"] for row in found["t.csv"]] == [2, 3, 4, 5, 6]
    for rows_found in found.values():
        assert [row["reward"] for row in rows_found] == [row["reward"] for row in found["t.jsonl"]]
    (folders / "t.csv").write_text("prompt,response\nw1,w2\nw1\n")
    assert "t.csv:3: 1 cells, where the first line names 2" in command("score", "dense", "t.csv").err
    (folders / "t.json").write_text('{"text": "w1"}')
    assert "t.json must hold a list of rows" in command("score", "dense", "t.json").err


def test_dialogues_in_one_string_become_conversations(folders, command, refused):
    rows_there = [
        {"messages": CHAT},
        {"text": DIALOGUE},
        {"prompt": "\n\nHuman: w1 w2\n\nAssistant:", "response": " w3"},
    ]
    (folders / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_there))
    rewards = [row["reward"] for row in lines(command("score", "dense", "chats.jsonl", *MARKS))]
    assert rewards == pytest.approx([rewards[0]] * 3, abs=1e-6)
    plain = [row["reward"] for row in lines(command("score", "dense", "chats.jsonl"))]
    assert plain[0] == pytest.approx(rewards[0], abs=1e-6) and plain[1] == pytest.approx(plain[2], abs=1e-6)
    assert abs(plain[1] - rewards[0]) > 1e-4, "without the marks they are plain text"
    parts = {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "w3"}]}]}
    (folders / "parts.jsonl").write_text(json.dumps(parts) + "\n")
    assert lines(command("score", "dense", "parts.jsonl"))[0]["reward"] == pytest.approx(rewards[0], abs=1e-6)
    assert "leave one of them out" in refused("score", "dense", "chats.jsonl", "--as-messages", *MARKS)
    (folders / "none.jsonl").write_text('{"text": "w1 w2"}\n')
    assert "none.jsonl:1: text has none of the marks" in command("score", "dense", "none.jsonl", *MARKS).err


def test_an_output_file_goes_on_where_it_was_cut_off(folders, command, monkeypatch):
    monkeypatch.setattr(score, "_BATCHES", 2)
    whole = command("score", "dense", "texts.jsonl", "--batch-size", 2).out
    done = command("score", "dense", "texts.jsonl", "--batch-size", 2, "--out", "rewards.jsonl")
    assert done.status == 0 and done.out == "", done.err
    path = folders / "rewards.jsonl"
    assert path.read_text() == whole
    kept = "".join(whole.splitlines(keepends=True)[:5])
    path.write_text(kept + '{"line": 6, "rew')
    done = command("score", "dense", "texts.jsonl", "--batch-size", 2, "--out", "rewards.jsonl")
    assert done.status == 0 and "5 texts were scored before" in done.err
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["line"] for row in found] == list(range(1, 12)) and path.read_text().startswith(kept)
    np.testing.assert_allclose([row["reward"] for row in found], plain_loop("dense"), rtol=1e-5, atol=1e-5)
    assert "0 texts in" in command("score", "dense", "texts.jsonl", "--batch-size", 2, "--out", "rewards.jsonl").err
    for options, named in ((("dense", "--batch-size", 3), "batch_size"), (("sequence", "--batch-size", 2), "model")):
        refused = command("score", options[0], "texts.jsonl", *options[1:], "--out", "rewards.jsonl")
        assert refused.status == 2 and f"was made with another {named}" in refused.err
    path.write_text(kept.replace('"line": 5', '"line": 7'))
    refused = command("score", "dense", "texts.jsonl", "--batch-size", 2, "--out", "rewards.jsonl")
    assert refused.status == 2 and "the input has changed" in refused.err
    (folders / "rewards.jsonl.settings.json").unlink()
    refused = command("score", "dense", "texts.jsonl", "--batch-size", 2, "--out", "rewards.jsonl")
    assert refused.status == 2 and "can't be gone on with" in refused.err


@pytest.mark.full
def test_several_processes_keep_the_order_and_go_on(folders, command, monkeypatch):
    monkeypatch.setattr(score, "_BATCHES", 1)  # windows of 2 lines, more than are started ahead
    options = ("score", "sequence", "texts.jsonl", "--batch-size", 2, "--members")
    one = command(*options).out
    assert command(*options, "--num-processes", 2, "--out", "rewards.jsonl").status == 0
    path = folders / "rewards.jsonl"
    assert path.read_text() == one
    path.write_text("".join(one.splitlines(keepends=True)[:4]))
    done = command(*options, "--num-processes", 2, "--out", "rewards.jsonl")
    assert done.status == 0 and "4 texts were scored before" in done.err and path.read_text() == one


def test_a_number_of_processes_is_one_at_least(folders, command):
    refused = command("score", "dense", "texts.jsonl", "--num-processes", 0)
    assert refused.status == 2 and "`--num-processes` must be at least 1, got 0" in refused.err
