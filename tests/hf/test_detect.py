"""Models in no row: found by structure and proven, or a clear error with the row to write; and rows at run time."""

import re
import subprocess
import sys
import textwrap

import pytest
import torch
from checkout import ROOT
from tiny_models import MODEL_TYPES, VOCABULARY, outputs_of, padded_batch, perturb_experts
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import ummrm
from ummrm import Family, FFNPaths, UpcycleConfig
from ummrm.hf.detect import detect_family, find_family
from ummrm.hf.families import FAMILIES, REGISTERED, known_family
from ummrm.nn.upcycled_ffn import upcycled_ffns

DOC = (ROOT / "docs" / "families.md").read_text()
CONFIG = UpcycleConfig(num_experts=3, num_experts_per_tok=2)
GATED = FFNPaths(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")


def config_of(model_type, **overrides):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return CONFIG_MAPPING[model_type](**{**sizes, **overrides})


FOUND = [
    ("glm", {"head_dim": 8}, Family("glm", FFNPaths("mlp.gate_up_proj[1]", "mlp.down_proj", "mlp.gate_up_proj[0]"))),
    ("arcee", {}, Family("arcee", FFNPaths(up="mlp.up_proj", down="mlp.down_proj"))),
    (
        "gptj",
        {"rotary_dim": 4},
        Family("gptj", FFNPaths("mlp.fc_in", "mlp.fc_out"), layers="h", activation="activation_function"),
    ),
    ("cohere", {"num_key_value_heads": 2}, Family("cohere", GATED)),
]


@pytest.mark.parametrize(("model_type", "overrides", "row"), FOUND, ids=[f[0] for f in FOUND])
def test_a_model_in_no_row_is_found_and_proven(model_type, overrides, row, tmp_path):
    """Fused, plain with relu2, under other names, and usual: upcycled, saved, reloaded, merged as any other."""
    dense = AutoModelForCausalLM.from_config(config_of(model_type, **overrides)).eval()
    batch = padded_batch(side="left")
    expected, stock = outputs_of(dense, batch), type(dense)
    moe = ummrm.upcycle(dense, CONFIG)
    found = moe.family
    assert moe.config.umm_family == found.to_dict() and known_family(model_type) is None
    assert {f: getattr(found, f) for f in ("paths", "layers", "site", "activation", "bypass")} == {
        f: getattr(row, f) for f in ("paths", "layers", "site", "activation", "bypass")
    }
    torch.testing.assert_close(outputs_of(moe, batch), expected, rtol=1e-5, atol=1e-5)
    live = int(batch["attention_mask"].sum())
    assert all(int(f.statistics.tokens_per_expert.sum()) == 2 * live for f in upcycled_ffns(moe).values())
    perturb_experts(moe).save_pretrained(tmp_path / "moe")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(outputs_of(reloaded, batch), outputs_of(moe, batch), rtol=1e-5, atol=1e-6)
    merged = ummrm.merge(ummrm.prepare_merge(moe))
    assert type(merged) is stock
    torch.testing.assert_close(outputs_of(merged, batch), outputs_of(moe, batch), rtol=1e-5, atol=1e-5)


NOT_SURE = [
    (
        "camembert",
        {},
        r"0 children of a CamembertLayer are provably FFNs; .*intermediate.dense \(24 to 44\).*site='\?'",
    ),
    ("bloom", {}, r"BloomMLP is not, for no hidden size"),
    ("seed_oss", {}, r"SeedOssMLP does not \(an active dropout\?\)"),
    ("distilbert", {"dim": 24, "hidden_dim": 44}, "got FFN with dropout at dropout"),
    ("apertus", {}, "ApertusMLP .*computes something else"),
    ("mixtral", {}, "0 children of a MixtralDecoderLayer are provably FFNs"),
    ("albert", {}, r"the backbone has 0 lists of layers \(none\), not one"),
    ("squeezebert", {"embedding_size": 24}, "0 children of a SqueezeBertModule are provably FFNs"),
    ("t5", {}, r"encoder is a model of its own.*masked='\?'"),
]


@pytest.mark.parametrize(("model_type", "overrides", "message"), NOT_SURE, ids=[case[0] for case in NOT_SURE])
def test_where_it_cannot_be_sure_the_error_says_what_was_found_and_the_row_to_write(
    model_type, overrides, message, monkeypatch
):
    monkeypatch.delitem(FAMILIES, model_type, raising=False)  # as if the table had no row
    backbone = AutoModel.from_config(config_of(model_type, **overrides))
    with pytest.raises(ValueError, match=f"no family for model_type '{model_type}'.*llama.*{message}") as refused:
        find_family(backbone)
    assert f"ummrm.register_family(Family(model_type='{model_type}'" in str(refused.value)
    assert "docs/families.md" in str(refused.value) and known_family(model_type) is None


def altered(change):
    backbone = AutoModel.from_config(config_of("helium"))
    change(backbone)
    return backbone


def mixed_layers(backbone):
    backbone.layers[1].__class__ = type("Another", (type(backbone.layers[1]),), {})


def second_ffn(backbone):
    for layer in backbone.layers:
        layer.more = torch.nn.Sequential(torch.nn.Linear(24, 7), torch.nn.ReLU(), torch.nn.Linear(7, 24))


def mixed_ffns(backbone):
    backbone.layers[1].mlp = torch.nn.Sequential(torch.nn.Linear(24, 7), torch.nn.ReLU(), torch.nn.Linear(7, 24))


def unnamed_activation(backbone):
    backbone.config.hidden_act = "mish"


def another_backbone(backbone):
    backbone.__class__ = type("Mine", (type(backbone),), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mixed_layers, r"the layers in layers are of several classes \(Another, HeliumDecoderLayer\)"),
        (second_ffn, r"2 children of a HeliumDecoderLayer are provably FFNs \(mlp, more\)"),
        (mixed_ffns, "mlp is of another class in another layer"),
        (unnamed_activation, r"the FFN computes silu, and 0 config fields say so.*activation='\?'"),
        (another_backbone, "its backbone, a Mine, is not the model that AutoModel has for it"),
    ],
)
def test_what_leaves_a_choice_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        detect_family(altered(change))


def test_a_row_that_does_not_fit_the_model_is_refused(monkeypatch):
    """Found on one model and registered, where the next model of the family has a dropout, or another activation."""
    codegen = {"n_embd": 24, "n_head": 4, "n_layer": 2, "rotary_dim": 4}
    another = AutoModel.from_config(config_of("arcee"))
    for family in (detect_family(AutoModel.from_config(config_of("codegen", **codegen))), detect_family(another)):
        monkeypatch.setitem(REGISTERED, family.model_type, family)
    dropping = AutoModelForCausalLM.from_config(config_of("codegen", **codegen, resid_pdrop=0.1))
    with pytest.raises(ValueError, match="row of 'codegen' does not fit this CodeGenForCausalLM: .*same in training"):
        ummrm.upcycle(dropping, CONFIG)
    another.layers[0].mlp.act_fn = torch.nn.SiLU()
    with pytest.raises(ValueError, match="row of 'arcee' does not fit this ArceeModel: .*computes what `ffn` computes"):
        ummrm.upcycle(another, CONFIG)


@pytest.fixture
def registered():
    """Families registered by the test, which are forgotten behind it."""
    before = dict(REGISTERED)
    yield REGISTERED
    REGISTERED.clear()
    REGISTERED.update(before)


def test_the_documented_family_works_from_its_row_to_its_export(tmp_path, monkeypatch, registered):
    """The page's own code, then a fresh process, where nothing is registered."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "families"}
    register, use = re.findall(r"^```python\n(.*?)^```", DOC, re.M | re.S)
    for code in (register, use):
        exec(compile(code, "docs/families.md", "exec"), namespace)
    assert type(namespace["merged"]).__name__ == "GPTBigCodeForSequenceClassification"
    batch = padded_batch()
    torch.save((batch, outputs_of(namespace["merged"], batch), outputs_of(namespace["moe"], batch)), "expected.pt")
    ummrm.register_family(namespace["BIGCODE"])  # once more is no error
    assert registered["gpt_bigcode"] == namespace["BIGCODE"]
    with pytest.raises(ValueError, match="must be the only row of 'gpt_bigcode', which has another one: Family"):
        ummrm.register_family(Family("gpt_bigcode", GATED))
    script = textwrap.dedent("""
        import sys, torch
        from transformers import AutoModelForSequenceClassification as Auto
        batch, merged, mixture = torch.load("expected.pt")
        torch.testing.assert_close(Auto.from_pretrained("bigcode-merged")(**batch).logits.flatten(), merged)
        assert "ummrm" not in sys.modules
        import ummrm
        torch.testing.assert_close(Auto.from_pretrained("bigcode-moe")(**batch).logits.flatten(), mixture)
    """)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_documented_table_names_every_row():
    table = DOC[: DOC.index("## A model in no row")]
    listed = {name for row in re.findall(r"^\| ([a-z0-9_, -]+) \|", table, re.M) for name in row.split(", ")}
    listed.discard("model_type")
    assert listed == set(MODEL_TYPES)


def test_every_page_counts_them_alike():
    for page in ("README.md", "CHANGELOG.md", "docs/images/overview.svg"):
        counts = re.findall(r"(\d+) (?:Hugging Face )?families", (ROOT / page).read_text())
        assert counts == [str(len(MODEL_TYPES))], page


@pytest.mark.parametrize("row", [FAMILIES[m] for m in MODEL_TYPES], ids=MODEL_TYPES)
def test_a_row_prints_as_the_code_that_makes_it(row):
    assert eval(str(row), {"Family": Family, "FFNPaths": FFNPaths}) == row


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("nothing", "`model_type` must be known to transformers, got 'nothing'"),
        ("blip_text_model", "`model_type` must be one that AutoModel has a model for, got 'blip_text_model'"),
    ],
)
def test_a_model_type_without_models_is_refused(model_type, message):
    with pytest.raises(ValueError, match=message):
        ummrm.register_family(Family(model_type, GATED))
    assert known_family(model_type) is None


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "gptj"])
def test_members_of_upper_layers_score_in_a_model_found_by_structure(model_type):
    """GPT-BigCode gives its outputs the shape of its inputs, which more rows above the lower layers would not fit."""
    sizes = {"n_embd": 24, "n_head": 4, "n_layer": 2, "num_labels": 1, "rotary_dim": 4}
    config = config_of(model_type, resid_pdrop=0.0, **sizes)
    dense = AutoModelForSequenceClassification.from_config(config).eval()
    moe = ummrm.upcycle(dense, UpcycleConfig(assignment="sequence", num_experts=3, layers=(1,)), copy=True)
    batch = padded_batch(lengths=(9, 4))
    with torch.no_grad():
        expected = dense(**batch).logits
        torch.testing.assert_close(moe.member_scores(**batch), expected.expand(2, 3), rtol=1e-5, atol=1e-5)
        perturb_experts(moe)
        scores = moe.member_scores(**batch)
        for member in range(3):
            ummrm.set_evaluation(moe, member)
            torch.testing.assert_close(scores[:, member:][:, :1], moe(**batch).logits, rtol=1e-5, atol=1e-5)
    assert scores.std(1).min() > 1e-3
