"""The README's code runs as it stands, from the first block to the last, and its links and commands exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    code = blocks("python")
    assert len(code) == 5
    for block in code:
        exec(compile(block, "README.md", "exec"), namespace)
    assert type(namespace["merged"]).__name__ == "LlamaForSequenceClassification"
    assert (tmp_path / "merged-rm" / "model.safetensors").is_file()
    network, dense = namespace["network"], namespace["dense_network"]
    assert type(dense[1].ffn) is torch.nn.Sequential
    torch.testing.assert_close(dense(namespace["x"]), network(namespace["x"]), rtol=1e-5, atol=1e-6)


def test_relative_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.M))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
