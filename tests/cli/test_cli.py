"""The commands as a user meets them: what they write, what they print, and what they need."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny_models import outputs_of, padded_batch, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf import replacing

COMPANIONS = (
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "merges.txt",
    "modules.py.txt",
)


def add_companions(folder):
    for name in COMPANIONS:
        (folder / name).write_text(f"{name} of the source")


def brings_companions(folder):
    return all((folder / name).read_text() == f"{name} of the source" for name in COMPANIONS)


def interrupt_a_save(folder):
    """Leaves a model's folder as a save into it that is killed once the old files are aside."""
    pending = folder / replacing.PENDING
    (pending / "new" / folder.name).mkdir(parents=True)
    (pending / "old").mkdir()
    names = ["config.json", "model.safetensors"]
    for name in names:
        shutil.copy(folder / name, pending / "old")
        (folder / name).rename(pending / "new" / folder.name / name)
    journal = {"name": folder.name, "files": names, "stale": [], "gate": "config.json"}
    (pending / "journal.json").write_text(json.dumps(journal))


def test_an_interrupted_save_into_a_folder_that_is_read_or_written_is_completed_first(models, command):
    for name in ("moe", "dense"):
        interrupt_a_save(models / name)
    done = command("info", "moe")
    assert done.status == 0 and "mixture of experts" in done.out, done.err
    assert done.err.startswith("warning: a save into ") and "is completed now" in done.err
    done = command("merge", "moe", "dense")
    assert done.status == 2 and "dense holds a model already" in done.err and "is completed now" in done.err
    assert sorted(path.name for path in (models / "dense").iterdir()) == ["config.json", "model.safetensors"]


def test_a_tokenizer_of_the_model_that_was_replaced_is_named_where_its_files_stay(models, command):
    (models / "dense/tokenizer.json").write_text("{}")
    shutil.copytree("dense", "out")
    assert "warning" not in command("upcycle", "dense", "out", "--overwrite", "-e", 2, "-k", 1).err
    for name in (
        "chat_template.jinja",
        "tokenizer.model",
        "vocab.txt",
        "notes.txt",
        "additional_chat_templates/a.jinja",
    ):
        (models / "out" / name).parent.mkdir(exist_ok=True)
        (models / "out" / name).write_text("of another model")
    done = command("merge", "merging", "out", "--overwrite")
    warning = next(line for line in done.err.splitlines() if line.startswith("warning: "))
    assert done.status == 0 and warning == (
        "warning: out still holds tokenizer files of the model that was there, which merging does not have: "
        "additional_chat_templates, chat_template.jinja, tokenizer.json, tokenizer.model, vocab.txt; remove them "
        "unless they are this model's."
    )
    assert (models / "out/vocab.txt").read_text() == "of another model"


def test_a_base_model_that_names_no_class_gets_a_fresh_head_where_one_is_asked_for(models, command, refused):
    tiny_model("llama", "ForCausalLM").model.save_pretrained("base")
    config = json.loads((models / "base/config.json").read_text())
    (models / "base/config.json").write_text(json.dumps({**config, "architectures": None}))
    assert "give --new-head" in refused("upcycle", "base", "out")
    assert "must name the model's class" in refused("upcycle", "base", "out", "--no-new-head")
    done = command("upcycle", "base", "out", "--new-head", "-e", 2, "-k", 1)
    assert done.status == 0 and "UmmLlamaForSequenceClassification" in done.out, done.err
    (models / "base/config.json").write_text(json.dumps({**config, "architectures": None, "model_type": "mamba"}))
    assert "no class with a reward head for model_type 'mamba'" in refused("upcycle", "base", "out", "--new-head")


def test_upcycle_then_merge_gives_the_dense_model_back(models, command):
    add_companions(models / "dense")
    (models / "dense/README.md").write_text("the card of the source")
    done = command("upcycle", "dense", "new/moe", "--num-experts", 3, "-k", 2, "--seed", 5)
    assert done.status == 0 and "UmmLlamaForSequenceClassification" in done.out, done.err
    assert "[1/3] loading dense" in done.err and "[3/3] saving new/moe" in done.err  # lines in a log, no bars
    assert "%" not in done.err and "\r" not in done.err
    moe = AutoModelForSequenceClassification.from_pretrained("new/moe")
    assert moe.config.upcycle_config == UpcycleConfig(num_experts=3, num_experts_per_tok=2)
    done = command("merge", "new/moe", "merged", "--shared-share", 0.75)
    assert done.status == 0 and "uniform merge weights" in done.out, done.err
    batch = padded_batch()
    dense, merged = (AutoModelForSequenceClassification.from_pretrained(name) for name in ("dense", "merged"))
    torch.testing.assert_close(outputs_of(merged, batch), outputs_of(dense, batch), rtol=1e-5, atol=1e-5)
    assert brings_companions(models / "new/moe") and brings_companions(models / "merged")
    assert "Merged reward model" in (models / "merged/README.md").read_text()


def test_merge_uses_learned_weights(models, command):
    done = command("merge", "merging", "merged", "--dtype", "bfloat16")
    assert "learned merge weights" in done.out, done.err
    assert AutoModelForSequenceClassification.from_pretrained("merged").dtype == torch.bfloat16


def test_every_field_of_the_configuration_is_an_option(models, command):
    """And the options go before the file, in YAML and in JSON."""
    given = UpcycleConfig(
        num_experts=3,
        num_experts_per_tok=2,
        num_shared_experts=2,
        gate="fixed",
        fixed_shared_weight=0.25,
        router="mlp",
        router_noise="jitter",
        jitter_eps=0.125,
        router_init_std=0.5,
        layers=(0,),
        expert_noise=0.0625,
        balancing_loss="cv_squared",
        balancing_loss_coef=0.75,
        z_loss_coef=0.375,
    )
    other = UpcycleConfig(assignment="sequence", experts_in="linear", evaluation=1)
    default, sequence = UpcycleConfig(), UpcycleConfig(assignment="sequence")
    for f in fields(UpcycleConfig):
        differs = any(getattr(a, f.name) != getattr(b, f.name) for a, b in ((given, default), (other, sequence)))
        assert differs or f.name == "assignment", f"set {f.name}"

    def as_options(config):
        options = []
        for name, value in config.to_dict().items():
            options += ["--" + name.replace("_", "-"), f"{value[0]}," if isinstance(value, list) else value]
        return options

    done = command("upcycle", "dense", "linear", *as_options(other))
    assert done.status == 0, done.err
    assert json.loads((models / "linear/config.json").read_text())["umm"] == other.to_dict()
    done = command("info", "linear")
    assert done.status == 0 and "sequence" in done.out and "linear" in done.out, done.out
    done = command("merge", "linear", "linear-merged")
    assert done.status == 0 and json.loads((models / "linear-merged/config.json").read_text())["model_type"] == "llama"
    options = as_options(given)
    (models / "options.yaml").write_text("num_experts: 4\ngate: shared_complement\nlayers: all\n")
    done = command("upcycle", "dense", "out", "--config", "options.yaml", *options)
    assert done.status == 0, done.err
    assert json.loads((models / "out/config.json").read_text())["umm"] == given.to_dict()
    (models / "options.json").write_text(json.dumps(given.to_dict()))
    done = command(
        "upcycle", "dense", "out", "--config", "options.json", "-e", 4, "--router-noise", "none", "--overwrite"
    )
    assert done.status == 0 and "replaced" in done.out, done.err
    kept = UpcycleConfig.from_dict(json.loads((models / "out/config.json").read_text())["umm"])
    assert kept.num_experts == 4 and kept.router_noise is None and kept.gate == "fixed"


def test_a_seed_and_a_dtype(models, command):
    def router_and_dtype(*options):
        assert command("upcycle", "dense", "out", "--overwrite", *options).status == 0
        moe = AutoModelForSequenceClassification.from_pretrained("out")
        return next(p.detach() for n, p in moe.named_parameters() if "router" in n), moe.dtype

    first, dtype = router_and_dtype("--seed", 1)
    again, half = router_and_dtype("--seed", 1, "--dtype", "bfloat16")
    other, _ = router_and_dtype("--seed", 2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == again.dtype == torch.float32 and (dtype, half) == (torch.float32, torch.bfloat16)


def test_a_base_model_gets_a_head_only_when_asked(models, command, refused):
    tiny_model("llama", "ForCausalLM").save_pretrained("base")
    line = refused("upcycle", "base", "out")
    assert "no reward head" in line and "--new-head" in line and "--no-new-head" in line
    assert "leave --new-head out" in refused("upcycle", "dense", "out", "--new-head")
    done = command("upcycle", "base", "rewards", "--new-head")
    assert done.status == 0 and "UmmLlamaForSequenceClassification" in done.out, done.err
    assert AutoModelForSequenceClassification.from_pretrained("rewards").score.weight.shape[0] == 1
    done = command("upcycle", "base", "language", "--no-new-head")
    assert done.status == 0 and "UmmLlamaForCausalLM" in done.out, done.err


@pytest.mark.parametrize("tokenizer", ["pad", "eos", "outside", None])
def test_a_fresh_head_scores_a_batch_or_the_user_hears_why_not(models, command, tokenizer):
    """The stock head finds each sequence's last token by the padding, which many base models don't name."""
    base = tiny_model("llama", "ForCausalLM")
    base.config.pad_token_id = None
    base.save_pretrained("base")
    words = {"[UNK]": 0, "</s>": 1, "<pad>": 2, "a": 3}
    if tokenizer == "outside":  # added behind the model's vocabulary
        words["<pad>"] = base.config.vocab_size
    if tokenizer:
        special = {"eos_token": "</s>"} | ({} if tokenizer == "eos" else {"pad_token": "<pad>"})
        backend = Tokenizer(WordLevel(words, "[UNK]"))
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained("base")
    done = command("upcycle", "base", "out", "--new-head", "-e", 2, "-k", 1)
    assert done.status == 0, done.err
    assert "is a fresh head (seed 0" in done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("note:") and "pad_token_id" in line]
    moe = AutoModelForSequenceClassification.from_pretrained("out")
    token = {"pad": 2, "eos": 1, "outside": 1, None: None}[tokenizer]
    assert moe.config.pad_token_id == token
    if token is None:
        assert "set pad_token_id in out/config.json" in line
        return
    assert f"pad_token_id {token}" in line and ("eos" in line) == (token == 1)
    ids = torch.tensor([[3, 0, 3, 3], [3, 0, token, token]])
    logits = moe.eval()(ids, attention_mask=(ids != token).long()).logits
    torch.testing.assert_close(logits[1:], moe(ids[1:, :2]).logits)


def test_a_folder_that_holds_something(models, command, refused):
    """It is replaced only when asked, and what ummrm does not write stays."""
    assert "holds a model already" in refused("upcycle", "dense", "moe")
    (models / "notes").mkdir()
    (models / "notes/todo.txt").write_text("mine")
    assert "holds todo.txt already" in refused("upcycle", "dense", "notes")
    done = command("upcycle", "dense", "notes", "--overwrite")
    assert done.status == 0 and "replaced" not in done.out and (models / "notes/todo.txt").read_text() == "mine"
    (models / "fresh/.git").mkdir(parents=True)  # a clone that was just made
    assert command("merge", "moe", "fresh").status == 0


def test_an_output_that_can_not_be_written(models, refused, monkeypatch):
    (models / "file").write_text("mine")
    (models / "nowhere").symlink_to("not/there")
    (models / "blocked").mkdir()
    (models / "blocked/config.json").mkdir()
    os.mkfifo(models / "pipe")
    for out, message in {
        "file": "a file stands there",
        "file/below": "lies inside a file",
        "pipe": "a named pipe (FIFO) stands there",
        "nowhere": "leads nowhere",
        "x" * 300: "can't be written",
        "": "must be the name of a folder",
        "/proc/ummrm-out": "can't be written",
    }.items():
        assert message in refused("upcycle", "dense", out)
    assert "a folder stands there" in refused("merge", "moe", "blocked", "--overwrite")


def make_hub_copy(cache, name, source):
    """A model as the hub's cache keeps it: a snapshot of links into blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy2(path, repository / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")


def test_a_hub_name_from_the_cache_brings_everything(models, command, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(models / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    add_companions(models / "dense")
    make_hub_copy(models / "cache", "some-organisation/some-model", models / "dense")
    done = command("upcycle", "some-organisation/some-model", "out")
    assert done.status == 0 and "taken from the cache" in done.err and "no tokenizer" not in done.err, done.err
    assert brings_companions(models / "out") and not any(path.is_symlink() for path in (models / "out").iterdir())
    assert json.loads((models / "out/config.json").read_text())["umm_base_model"] == "some-organisation/some-model"


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    def do_GET(self):
        files = sorted(path.name for path in self.server.folder.iterdir())
        if self.path.startswith("/api/models/"):
            if "/tree/" in self.path:
                sizes = {name: (self.server.folder / name).stat().st_size for name in files}
                body = [
                    {"type": "file", "path": n, "size": s, "oid": f"{i:040}"} for i, (n, s) in enumerate(sizes.items())
                ]
            else:
                body = {"id": "o/m", "sha": "1" * 40, "siblings": [{"rfilename": name} for name in files]}
            return self._answer(json.dumps(body).encode(), "application/json")
        name = self.path.rpartition("/")[2].partition("?")[0]
        if name not in files:
            return self.send_error(404)
        return self._answer((self.server.folder / name).read_bytes(), "application/octet-stream", name)

    do_HEAD = do_GET

    def _answer(self, body, kind, name="api"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_hub_name_is_fetched_with_everything(models, command, monkeypatch):
    from huggingface_hub import constants

    add_companions(models / "dense")
    (models / "dense/pytorch_model.bin").write_text("the same weights once more, which are left where they are")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder = models / "dense"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix("https://huggingface.co")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(models / "cache"))
    try:
        done = command("upcycle", "some-organisation/some-model", "out")
    finally:
        server.shutdown()
        server.server_close()
    assert done.status == 0, done.err
    assert brings_companions(models / "out") and "cache" not in done.err
    assert not list((models / "cache").rglob("pytorch_model.bin"))


def test_info_is_json_and_says_what_was_built(command):
    info = json.loads(command("info").out)
    assert info["ummrm"] == ummrm.__version__
    assert torch.__version__.startswith(info["torch_version"].split("+")[0])
    assert {"compiler", "cpu_isa", "fp32_gemm"} <= info.keys()
    assert (info["no_cuda_kernels"] is None) == bool(info["cuda_archs"])


def test_info_describes_a_folder_without_its_weights(models, command, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    dense, moe, merging = (json.loads(command("info", name, "--json").out) for name in ("dense", "moe", "merging"))
    assert [record["kind"] for record in (dense, moe, merging)] == ["dense", "mixture", "merging"]
    assert {record["family"] for record in (dense, moe, merging)} == {"llama"}
    assert (moe["num_experts"], moe["num_experts_per_tok"], moe["num_shared_experts"]) == (3, 2, 1)
    assert moe["layers"] == moe["upcycled_layers"] == 2 and merging["shared_share"] == 0.5
    assert dense["dtypes"] == {"float32": dense["parameters"]}
    monkeypatch.undo()
    for name, record in (("dense", dense), ("moe", moe), ("merging", merging)):
        model = AutoModelForSequenceClassification.from_pretrained(models / name)
        assert record["parameters"] == sum(p.numel() for p in model.parameters())
    ffn = 3 * 24 * 44 * 2  # three projections of two layers
    assert moe["parameters"] - moe["parameters_per_token"] == ffn
    monkeypatch.chdir(models)
    lines = command("info", "moe").out.splitlines()
    assert "kind                          mixture of experts" in lines and all(len(line) <= 80 for line in lines)


def test_the_version(command):
    assert command("--version").out == f"ummrm {ummrm.__version__}\n"


def test_the_traceback_on_demand(models, command, caplog):
    (models / "dense/config.json").write_text("{")
    assert command("upcycle", "dense", "out").status == 2 and "Traceback" not in caplog.text
    done = command("--traceback", "upcycle", "dense", "out")
    assert done.status == 2 and "JSONDecodeError" in caplog.text and "error: " in done.err


def test_help_fits_a_terminal(command):
    for arguments in (("--help",), ("upcycle", "--help"), ("merge", "--help"), ("info", "--help")):
        printed = command(*arguments).out
        assert max(map(len, printed.splitlines())) <= 80 and "Usage" in printed


def test_a_command_needs_only_what_it_uses(models, tmp_path_factory):
    """In a process without the extras, outside the checkout; a start loads no model code, an error ends it."""
    script = (
        "import runpy, sys\n"
        # (pydantic is typer's own)
        "for name in ('matplotlib', 'trl', 'peft', 'datasets', 'scipy', 'jinja2', 'accelerate', 'hypothesis'):\n"
        "    sys.modules[name] = None\n"
        "import ummrm\n"
        "before = set(sys.modules)\n"
        "from ummrm.cli import app\n"
        "added = {m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert not added & {'torch', 'transformers', 'safetensors', 'huggingface_hub'}, added\n"
        "for line in sys.argv[1:]: app(line.split(), standalone_mode=False)\n"
        "sys.argv[1:] = ['upcycle', 'none', 'out']\n"
        "runpy.run_module('ummrm', run_name='__main__')\n"
    )
    commands = [f"upcycle {models}/dense moe2 --config few.yaml", "merge moe2 merged", "info", "info moe2", "--version"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "few.yaml").write_text("num_experts: 2\nnum_experts_per_tok: 1\n")
    command = [sys.executable, "-P", "-c", script, *commands]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: there is no folder 'none'")
    assert (elsewhere / "merged/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["typer", "rich", "yaml"])
def test_a_missing_library_of_the_command_line_is_named(name, monkeypatch, capsys):
    for module in [m for m in sys.modules if m.partition(".")[0] == name or m.startswith("ummrm.cli")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "ummrm.__main__", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["ummrm", "upcycle", "none", "out", "--config", __file__])
    with pytest.raises(SystemExit) as exit:
        __import__("ummrm.__main__").__main__.main()
    said = str(exit.value.code) + capsys.readouterr().err
    assert f"needs {name}" in said and "ummrm[cli]" in said
