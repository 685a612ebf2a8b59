"""`ummrm inspect`: distances against a plain loop, loads, agreement, merge weights; what it prints and refuses."""

import json

import pytest
import torch
from tiny_models import perturb_experts, tiny_model
from trl_inputs import make_tokenizer
from typer.testing import CliRunner

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.cli import app
from ummrm.cli.errors import UserError
from ummrm.hf.inspection import inspect_mixture
from ummrm.hf.loading import load_checkpoint
from ummrm.hf.texts import token_ids

CONFIGS = {
    "token": UpcycleConfig(num_experts=3, num_experts_per_tok=2),
    "sequence": UpcycleConfig(assignment="sequence", num_experts=3, experts_in="all"),
}


def command(*words):
    result = CliRunner().invoke(app, ["inspect", *map(str, words)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def mixture(kind):
    return perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIGS[kind])).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    for kind in CONFIGS:
        ummrm.save_pretrained(mixture(kind), folder / kind)
        make_tokenizer().save_pretrained(folder / kind)
    merging = ummrm.prepare_merge(mixture("token"), MergeConfig(shared_share=0.25))
    ummrm.save_pretrained(merging, folder / "merging")
    ummrm.save_pretrained(tiny_model("llama"), folder / "dense")
    rows = [{"text": f"w{i} w{2 * i}"} for i in range(6)] + [{"chosen": "w1 w2", "rejected": "w3"}]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_distances_are_those_of_a_plain_loop_and_none_as_upcycled(kind):
    fresh = ummrm.upcycle(tiny_model("llama"), CONFIGS[kind])
    assert all(one.spread == 0 and one.closest == (0, 1) for one in inspect_mixture(fresh).experts)
    moe = mixture(kind)
    report = inspect_mixture(moe).experts[0]
    state = {key: value.double() for key, value in moe.state_dict().items() if key.startswith(f"{report.name}.")}
    experts = [key for key in state if "shared" not in key and "router" not in key]
    flat = torch.cat([state[key].flatten(1) for key in experts], 1)
    expected = torch.cdist(flat, flat) / flat.mean(0).norm()
    torch.testing.assert_close(report.distances, expected, rtol=1e-9, atol=1e-12)
    pairs = {(i, j): expected[i, j].item() for i in range(3) for j in range(i)}
    assert tuple(sorted(report.closest, reverse=True)) == min(pairs, key=pairs.get)
    assert report.spread == pytest.approx((sum(d**2 for d in pairs.values()) / 3) ** 0.5)


def test_the_load_by_token_and_the_agreement_by_sequence_are_shown(folders):
    told = json.loads(command(folders / "token", "--texts", folders / "texts.jsonl", "--json").stdout)
    assert all(sum(one["slot_share"]) == pytest.approx(1) and 0 <= one["shared_weight"] <= 1 for one in told["modules"])
    assert told["agreement"] is None and len(told["modules"]) == 2
    told = json.loads(command(folders / "sequence", "--texts", folders / "texts.jsonl", "--json").stdout)
    moe, tokenizer = load_checkpoint(folders / "sequence"), make_tokenizer()
    texts = [f"w{i} w{2 * i}" for i in range(6)] + ["w1 w2", "w3"]
    with torch.no_grad():
        ids = [token_ids(tokenizer, text) for text in texts]
        scores = torch.cat([moe.member_scores(input_ids=torch.tensor([one])) for one in ids]).double()
    told_for = torch.tensor(told["agreement"], dtype=torch.float64)
    torch.testing.assert_close(told_for, torch.corrcoef(scores.t()), rtol=1e-3, atol=1e-3)
    assert told["modules"][0]["slot_share"] is None
    assert "correlation of members' scores" in command(folders / "sequence", "--texts", folders / "texts.jsonl").stdout


def test_merge_weights_are_shown_and_drawn(folders, tmp_path):
    told = json.loads(command(folders / "merging", "--json").stdout)
    assert told["shared_share"] == pytest.approx(0.25)
    for one in told["modules"]:
        for row in one["coefficients"]:
            assert row == [pytest.approx(0.25), *[pytest.approx(0.25)] * 3]
    text = command(folders / "merging", "--plot", tmp_path / "experts.png").stdout
    assert "lambda, the shared experts' share: 0.250" in text and "merge weights" in text
    assert (tmp_path / "experts.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dense"], "is a dense model and has no experts"),
        (["token", "--plot", "x.pdf"], "--plot must be a PNG file, got x.pdf"),
        (["token", "--texts", "no.jsonl"], "no.jsonl is not there"),
        (["token", "--texts", "broken.jsonl"], "broken.jsonl:2 is no JSON"),
        (["token", "--texts", "other.jsonl"], "row 1: a row of the data must have"),
        (["merging", "--texts", "texts.jsonl"], "must have a tokenizer for --texts"),
    ],
)
def test_mistakes_are_one_line(folders, monkeypatch, words, message):
    monkeypatch.chdir(folders)
    (folders / "broken.jsonl").write_text('{"text": "w1"}\n{"text"\n')
    (folders / "other.jsonl").write_text('{"words": "w1"}\n')
    with pytest.raises(UserError, match=message):
        command(*words)
