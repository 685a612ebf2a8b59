"""The command line as a user meets it: what it writes, what it prints, how it exits."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import outputs_of, padded_batch, tiny_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import ummrm
from ummrm import UpcycleConfig
from ummrm.cli import app, main

runner = CliRunner()


def run(*arguments):
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_upcycle_then_merge_gives_the_dense_model_back(tmp_path):
    dense, batch = tiny_model("llama"), padded_batch()
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    printed = run("upcycle", tmp_path / "dense", tmp_path / "moe", "--num-experts", 3, "--num-experts-per-tok", 2)
    assert "UmmLlamaForSequenceClassification" in printed
    moe = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    assert moe.config.upcycle_config == UpcycleConfig(num_experts=3, num_experts_per_tok=2)
    assert "uniform merge weights" in run("merge", tmp_path / "moe", tmp_path / "merged", "--shared-share", 0.75)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs_of(merged, batch), outputs_of(dense, batch), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "moe" / "tokenizer.json").is_file() and (tmp_path / "merged" / "tokenizer.json").is_file()


def test_merge_uses_learned_weights(tmp_path):
    moe = ummrm.prepare_merge(ummrm.upcycle(tiny_model("llama"), UpcycleConfig()))
    moe.save_pretrained(tmp_path / "moe")
    assert "learned merge weights" in run("merge", tmp_path / "moe", tmp_path / "merged")


def test_info_is_json_and_says_what_was_built():
    info = json.loads(run("info"))
    assert info["ummrm"] == ummrm.__version__
    assert torch.__version__.startswith(info["torch_version"].split("+")[0])
    assert {"compiler", "cpu_isa", "fp32_gemm"} <= info.keys()
    assert (info["no_cuda_kernels"] is None) == bool(info["cuda_archs"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["merge", "DENSE", "out"], 2, "is no upcycled model"),
        (["upcycle", "DENSE", "out", "--num-experts", "0"], 2, "`num_experts` must be an integer of at least 1, got 0"),
        (["upcycle", "DENSE", "out", "--layers", "first"], 2, '--layers must be "all", a number'),
    ],
)
def test_a_users_error_is_one_line_and_an_exit_status(arguments, status, message, tmp_path, monkeypatch, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    arguments = [str(tmp_path / "dense") if a == "DENSE" else a for a in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ummrm", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    error = capsys.readouterr().err
    assert exit.value.code == status and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_users_error_ends_the_process_likewise(tmp_path):
    command = [sys.executable, "-P", "-m", "ummrm", "upcycle", "none", "out", "--layers", "first"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "--layers must be" in done.stderr and "Traceback" not in done.stderr
