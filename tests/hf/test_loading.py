"""Strict loading: a checkpoint with a hole, a surplus or a wrong shape is an error that names the tensor."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EACH_TYPE, outputs_of, padded_batch, tiny_model
from transformers import AutoModel, AutoModelForSequenceClassification

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf.loading import load_checkpoint

CONFIG = UpcycleConfig(num_experts=3, num_experts_per_tok=2, layers=[1])
SEQUENCE = UpcycleConfig(assignment="sequence", num_experts=3, experts_in="linear", layers=[1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model and upcycled ones with a layer that was left dense, saved."""
    root = tmp_path_factory.mktemp("whole")
    dense = tiny_model("llama")
    ummrm.save_pretrained(dense, root / "dense")
    for config, kind, phase in ((SEQUENCE, "sequence", "sequence merging"), (CONFIG, "moe", "merging")):
        moe = ummrm.upcycle(dense, config, copy=True)
        ummrm.save_pretrained(moe, root / kind)
        ummrm.save_pretrained(ummrm.prepare_merge(moe), root / phase)
    return root


def spoilt(folders, kind, tmp_path, change):
    """A copy of a folder whose tensors went through `change`."""
    target = tmp_path / kind
    target.mkdir()
    tensors = load_file(folders / kind / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folders / kind / "config.json").read_text())
    return target


HOLES = {
    "dense": ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "score.weight"],
    "moe": [
        "score.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.router.weight",
        "model.layers.1.mlp.shared_experts.down_proj",
        "model.norm.weight",
    ],
    "merging": ["model.layers.1.mlp.alpha", "model.layers.1.mlp.experts.gate_up_proj"],
    "sequence": ["model.layers.1.self_attn.q_proj.expert_weight", "model.layers.1.mlp.experts.gate_up_proj"],
    "sequence merging": ["model.layers.1.self_attn.o_proj.alpha", "model.layers.1.self_attn.k_proj.expert_weight"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in HOLES.items() for name in names])
def test_a_hole_is_an_error_that_names_the_tensor(folders, kind, name, tmp_path):
    folder = spoilt(folders, kind, tmp_path, lambda tensors: tensors.pop(name))
    remedy = "Ask for a fresh head with new_head=True" if name == "score.weight" else "save the model again"
    message = f"{folder} must hold every tensor of a .*LlamaForSequenceClassification and no other; missing: {name}. "
    with pytest.raises(ValueError, match=message + f".*{remedy}"):
        load_checkpoint(folder)
    if kind != "dense":
        with pytest.raises(ValueError, match=message):
            AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_surplus_and_a_wrong_shape_are_errors_too(folders, kind, tmp_path):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(44)
        tensors["score.bias"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(23)

    folder = spoilt(folders, kind, tmp_path, change)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(folder)
    assert "unexpected: model.layers.0.mlp.up_proj.bias, score.bias; " in str(caught.value)
    assert "of another shape: model.norm.weight is [23] and should be [24]. " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_whole_checkpoints_of_every_family_load(model_type, tmp_path):
    """What transformers ties, converts or leaves out (rotary buffers, position ids) is no hole."""
    batch = padded_batch()
    models = [tiny_model(model_type)]
    if causal := {"llama": "ForCausalLM", "gemma2": "ForCausalLM", "gpt2": "LMHeadModel"}.get(model_type):
        models.append(tiny_model(model_type, causal, tie_word_embeddings=True))
    for number, model in enumerate(models):
        folder = tmp_path / str(number)
        ummrm.save_pretrained(model, folder, max_shard_size="40KB")
        loaded = load_checkpoint(folder, expect="dense")
        assert type(loaded) is type(model)
        torch.testing.assert_close(outputs_of(loaded, batch), outputs_of(model, batch), rtol=1e-5, atol=1e-6)


def test_a_fresh_head_comes_only_where_it_is_asked_for(tmp_path):
    dense = tiny_model("llama", "ForCausalLM")
    body = {key: tensor.clone() for key, tensor in dense.model.state_dict().items()}
    ummrm.save_pretrained(dense, tmp_path / "dense")
    ummrm.save_pretrained(ummrm.upcycle(dense, CONFIG), tmp_path / "moe")
    assert type(load_checkpoint(tmp_path / "dense")).__name__ == "LlamaForCausalLM"
    reward = load_checkpoint(tmp_path / "dense", new_head=True)
    assert reward.config.num_labels == 1 and reward.score.weight.shape == (1, 24)
    assert all(torch.equal(tensor, body[key]) for key, tensor in reward.model.state_dict().items())
    moe = load_checkpoint(tmp_path / "moe", expect="upcycled", new_head=True)
    assert type(moe).__name__ == "UmmLlamaForSequenceClassification" and moe.score.weight.std() > 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe", num_labels=2).score.out_features == 2
    saved = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert len(saved.get("id2label", "ab")) == 1  # the tiny configuration says so: this asks for nothing new
    with pytest.raises(ValueError, match="missing: score.weight. Ask for a fresh head"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe", num_labels=1)
    assert type(AutoModel.from_pretrained(tmp_path / "moe")).__name__ == "UmmLlamaModel"
    (tmp_path / "hole").mkdir()
    folder = spoilt(
        tmp_path, "moe", tmp_path / "hole", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight")
    )
    with pytest.raises(ValueError, match="missing: model.layers.0.mlp.up_proj.weight"):
        load_checkpoint(folder, new_head=True)


def test_asking_for_the_labels_that_a_folder_has_asks_for_no_fresh_head(folders, tmp_path):
    hole = spoilt(folders, "moe", tmp_path, lambda tensors: tensors.pop("score.weight"))
    own = type(load_checkpoint(folders / "moe"))
    for cls in (own, AutoModelForSequenceClassification):
        for where in ({"pretrained_model_name_or_path": hole}, {"pretrained_model_name_or_path": tmp_path}):
            if where["pretrained_model_name_or_path"] == tmp_path:
                where["subfolder"] = "moe"
            with pytest.raises(ValueError, match="missing: score.weight. Ask for a fresh head"):
                cls.from_pretrained(**where, num_labels=1)
            assert cls.from_pretrained(**where, num_labels=3).score.out_features == 3
    with pytest.raises(ValueError, match="missing: score.weight"):
        load_checkpoint(tmp_path, subfolder="moe")
    loaded = load_checkpoint(folders, subfolder="moe", expect="upcycled")
    assert torch.equal(loaded.score.weight, own.from_pretrained(folders / "moe", num_labels=1).score.weight)
    causal = ummrm.upcycle(tiny_model("llama", "ForCausalLM"), CONFIG)
    causal.save_pretrained(tmp_path / "causal")
    assert own.from_pretrained(tmp_path / "causal", num_labels=1).score.out_features == 1


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_layers_beyond_the_configuration_are_never_dropped(folders, kind, tmp_path):
    folder = spoilt(folders, kind, tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    if kind == "moe":
        config["umm"]["layers"] = [0]
        tensors = load_file(folder / "model.safetensors")
        tensors = {k.replace(".1.mlp", ".0.mlp"): t for k, t in tensors.items() if ".0.mlp" not in k}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    loaders = [load_checkpoint, lambda source: load_checkpoint(source, new_head=True)]
    for load in loaders if kind == "dense" else [*loaders, AutoModel.from_pretrained]:
        with pytest.raises(ValueError, match="unexpected: model.layers.1.input_layernorm.weight"):
            load(folder)
    if kind == "dense":  # a backbone's own names in the folder of a model with a head: the first GPT-2 checkpoints
        ummrm.save_pretrained(tiny_model("gpt2", "LMHeadModel").transformer, tmp_path / "gpt2")
        config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
        for name in ("GPT2LMHeadModel", "GPT2Model"):
            config |= {"n_layer": 1, "architectures": [name]}
            (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
            with pytest.raises(ValueError, match="unexpected: h.1.attn"):
                load_checkpoint(tmp_path / "gpt2", new_head=name == "GPT2Model")


def test_a_checkpoint_that_names_no_class_can_get_a_fresh_head(folders, tmp_path):
    backbone = tiny_model("deberta-v2").deberta
    ummrm.save_pretrained(backbone, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path, new_head=True)
    assert type(loaded).__name__ == "DebertaV2ForSequenceClassification"
    assert all(torch.equal(tensor, backbone.state_dict()[key]) for key, tensor in loaded.deberta.state_dict().items())
    with pytest.raises(ValueError, match="must name its class in `architectures`"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_dense_checkpoint_may_hold_other_heads_and_a_pooler_that_its_class_has_not(model_type, tmp_path):
    """As bert-base-uncased and roberta-base do; what is the class's own must still be there, and nothing else in it."""
    model = tiny_model(model_type, "ForMaskedLM")
    ummrm.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {f"{model_type}.pooler.dense.weight": torch.zeros(24, 24), "cls.seq_relationship.bias": torch.zeros(2)}

    def save(more):
        save_file({**tensors, **extra, **more}, tmp_path / "model.safetensors", metadata={"format": "pt"})

    save({})
    with pytest.warns(UserWarning, match="leaves out what is another head's or a pooler's: .*seq_relationship.bias"):
        loaded = load_checkpoint(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    own = "cls.predictions.transform.dense.gain" if model_type == "bert" else "lm_head.dense.gain"
    for name in (own, f"{model_type}.encoder.layer.2.output.dense.weight"):
        save({name: torch.zeros(24)})
        with pytest.raises(ValueError, match=f"unexpected: {name}. "):
            load_checkpoint(tmp_path)


def damaged(folders, tmp_path, case):
    folder = spoilt(folders, "dense", tmp_path, lambda tensors: None)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if case == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif case.startswith("pickled weights"):
        weights.unlink()
        data = pickle.dumps({"score.weight": [0.0] * 100})
        cut = {"empty": b"", "cut": data[:50], "nonsense": b"nonsense"}[case.split()[-1]]
        (folder / "pytorch_model.bin").write_bytes(cut)
    elif case == "no weights":
        weights.unlink()
    elif case == "no config":
        config.unlink()
    elif case == "broken config":
        config.write_text(config.read_text()[:-20])
    elif case == "a file":
        return weights
    elif case == "misspelt":
        return tmp_path / "dnse"
    elif case in ("no class", "other class", "no model class"):
        name = {"no class": None, "other class": ["LlamaForNothing"], "no model class": ["AutoConfig"]}[case]
        config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": name}))
    elif case == "unknown type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "nothing"}))
    return folder


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("truncated", ValueError, "its weights are damaged .*save the model again"),
        ("pickled weights empty", ValueError, "its weights are damaged .*save the model again"),
        ("pickled weights cut", ValueError, "its weights are damaged .*save the model again"),
        ("pickled weights nonsense", ValueError, "its weights are damaged .*save the model again"),
        ("no weights", OSError, "no file named model.safetensors"),
        ("no config", OSError, "has no config.json"),
        ("broken config", OSError, "not a valid JSON file"),
        ("a file", OSError, "must be a folder or a hub name, got .*: a file"),
        ("misspelt", OSError, "must be a folder or a hub name, got .*: no folder there"),
        ("no class", ValueError, "must name its class in `architectures`"),
        ("other class", ValueError, "holds a LlamaForNothing, which is no model class"),
        ("no model class", ValueError, "holds a AutoConfig, which is no model class"),
        ("unknown type", ValueError, "does not recognize this architecture"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_one_line(folders, case, error, message, tmp_path):
    source = damaged(folders, tmp_path, case)
    with pytest.raises(error, match=message) as caught:
        load_checkpoint(source)
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)


def test_the_kind_that_is_expected(folders):
    with pytest.raises(ValueError, match="must be a dense model, and is an upcycled one"):
        load_checkpoint(folders / "moe", expect="dense")
    with pytest.raises(ValueError, match="is no upcycled model .*`ummrm upcycle`"):
        load_checkpoint(folders / "dense", expect="upcycled")
