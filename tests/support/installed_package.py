"""Tries the installed package as a user has it: from a folder that is no checkout, in an environment with nothing else.

    python -P installed_package.py FOLDER       (FOLDER is empty, and gets two small models)

Run by the session `package` of tools/noxfile.py; uses no test framework, which a user does not have.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

COMMAND = Path(sys.executable).parent / "ummrm"


def check_files():
    """Only the package is installed: no laboratory, no tests, no sources of kernels, no results."""
    files = importlib.metadata.files("ummrm")
    tops = {file.parts[0] for file in files if file.parts[0] != ".."}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ummrm"}, tops
    assert [str(file) for file in files if "results" in file.parts or file.suffix in (".csv", ".cu", ".cpp")] == []
    names = {file.as_posix() for file in files}
    assert {"ummrm/py.typed", "ummrm/_build_record.json", "ummrm/ops/triton_kernels/routing.py"} <= names
    assert any(file.suffix == ".so" for file in files)
    others = ("lab", "tests", "bench", "kernels", "csrc", "tools")
    strangers = [name for name in others if importlib.util.find_spec(name)]
    assert strangers == [], f"{strangers} can be imported here: is this the checkout?"


def command(*arguments):
    done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"ummrm {arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_commands(folder):
    version = importlib.metadata.version("ummrm")
    assert version in command("--version")
    assert json.loads(command("info"))["ummrm"] == version
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=1, pad_token_id=0, **sizes)).eval()
    dense.save_pretrained(folder / "dense")
    command("upcycle", folder / "dense", folder / "moe")
    command("merge", folder / "moe", folder / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    assert type(merged) is LlamaForSequenceClassification
    tokens = torch.randint(1, 64, (3, 9))
    torch.testing.assert_close(merged(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)


def check_what_is_missing():
    """Without its extra, a trainer says which one it needs."""
    assert importlib.util.find_spec("trl") is None, "TRL is installed here: this environment is not fresh"
    use = "import ummrm; ummrm.UmmRewardTrainer"
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True)
    assert done.returncode != 0 and "pip install 'ummrm[trl]'" in done.stderr, done.stderr


def main():
    (folder,) = map(Path, sys.argv[1:])
    check_files()
    check_commands(folder)
    check_what_is_missing()
    print(f"ummrm {importlib.metadata.version('ummrm')} works as installed in {sys.prefix}")


if __name__ == "__main__":
    main()
