"""The programs of bench/ that time more than an operator, and the products: their parts work at tiny sizes."""

import json
import math

import checkout  # noqa: F401  (for `bench`)
import pytest
import torch

from bench import bench_product, page, program, record, score, step
from bench.workload import Layer

ABOUT = {"device": "a processor", "threads": 1, "load_average": [0.5], "commit": "c", "versions": {"torch": "2"}}


@pytest.mark.parametrize("kind", bench_product.KINDS)
def test_libraries_multiply_the_same(kind):
    """Those that are installed; oneDNN and torch's always are."""
    inputs = bench_product.make_inputs(Layer(37, 24, 41, 1, 1, 0), kind)
    want = bench_product.mm(kind, **{name: value.double() for name, value in inputs.items()})
    measured = {}
    for label, contender in bench_product.contenders(kind, 1).items():
        if not isinstance(contender, str):
            function = getattr(contender, "function", contender)
            measured[label] = (function(**inputs) - want).abs().max().item()
    assert {record.OURS, "torch mm", "oneDNN"} <= set(measured)
    assert max(measured.values()) < 2e-5, measured


def test_what_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(bench_product.importlib.util, "find_spec", lambda name: None)
    found = bench_product.libraries(1)
    assert found["BLIS"] == "blis is not installed" and "threadpoolctl is not installed" in found["numpy"]


def test_rounds_are_side_by_side_and_the_first_is_left_out():
    order = []

    def call(label, *seconds):
        return lambda: order.append(label) or seconds

    found = program.rounds({"a": call("a", 3, 1), "b": call("b", 2, 2)}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" and found == {"a": [(3, 1)] * 3, "b": [(2, 2)] * 3}
    assert program.best([(3, 1), (2, 5)]) == [2, 1] and program.noise([(3, 1), (2, 3), (4, 0)]) == pytest.approx(0.25)


def test_batches_have_lengths_of_answers():
    batch = step.batch_of(16, 96)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lengths = mask.sum(1)
    assert len(ids) == 32 and ids.shape[1] == lengths.max() <= 96 and lengths.unique().numel() > 10
    assert (ids[mask == 0] == step.PADDING).all() and (ids[mask == 1] != step.PADDING).all()
    assert 0.3 < mask.float().mean() < 0.9 and torch.equal(ids, step.batch_of(16, 96)["input_ids"])


def test_a_training_step_in_parts(tmp_path, capsys):
    entries = step.measure(32, 48, 1, 4, 12, 2)
    found = {entry["label"]: entry for entry in entries}
    assert list(found) == ["dense", *step.MIXTURES, step.MERGED, *(f"Mixtral 9, 3, {way}" for way in step.MIXTRAL)]
    for entry in entries:
        assert min(entry["seconds"].values()) > 0 and math.isfinite(entry["noise"])
        assert entry["bytes"]["activations"] > 0
    expert = 3 * 32 * 48 * 4
    sizes = {label: entry["bytes"] for label, entry in found.items()}
    assert all(of["states"] == 2 * of["gradients"] for of in sizes.values())
    assert sizes["sequence 4, 1, 0"]["gradients"] - sizes["dense"]["gradients"] == 3 * expert
    assert 8 * expert <= sizes["token 8, 2, 1"]["gradients"] - sizes["dense"]["gradients"] < 8 * expert + 4 * 32 * 8 + 1
    merge = sizes[step.MERGED]
    assert merge["gradients"] == 7 * 4 < merge["parameters"]  # alpha alone
    path = program.write("step", {"about": ABOUT, "entries": entries}, 1, tmp_path / "step.json")
    assert json.loads(path.read_text())["entries"] == json.loads(json.dumps(entries))
    assert "token 7, 5, 1" in capsys.readouterr().out
    shown = page.filled("<!-- bench cells step step.json | columns: model; over dense -->\n<!-- end -->", tmp_path)
    assert "| dense | 1.00 |" in shown


def test_the_merged_model_has_the_dense_models_class_and_shapes():
    dense, merged = score.merged_entries((32, 48, 1, 2, 12), 2)
    assert (dense["label"], merged["label"]) == ("dense", "merged") and dense["cells"]["over dense"] == "1.000"
    assert merged["seconds"] > 0


def test_the_plain_loop_scores_a_file_in_order(tmp_path):
    """The rewards of one text at a time, unpadded; the command's are compared with the loop's in every measurement."""
    score.save_model(tmp_path / "model", 32)
    score.write_texts(tmp_path / "texts.jsonl", 40, 1)
    model = score.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = score.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert score.loop(model, tokenizer, tmp_path / "texts.jsonl", tmp_path / "out") > 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    with torch.no_grad():
        want = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    torch.testing.assert_close(score.rewards_of(tmp_path / "out"), torch.tensor(want), rtol=1e-4, atol=1e-5)
    assert len(texts) == 40 and torch.tensor(want).std() > 0
