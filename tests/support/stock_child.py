"""Scores with stock transformers and without ummrm: `stock_child.py VERSION EXPECTED`.

VERSION is the beginning of transformers' version. EXPECTED is a JSON file: `merged` and `mixture`, folders; `texts`;
`logits`, the reward of each; `inputs`, what the tokenizer gives the model.
"""

import json
import sys
from pathlib import Path

sys.modules["ummrm"] = None  # whatever is installed beside

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline  # noqa: E402


def main(version, expected):
    assert transformers.__version__.startswith(version), transformers.__version__
    given = json.loads(Path(expected).read_text())
    wanted = torch.tensor(given["logits"])
    model, info = AutoModelForSequenceClassification.from_pretrained(given["merged"], output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__module__.startswith("transformers."), type(model)
    tokenizer = AutoTokenizer.from_pretrained(given["merged"])
    batch = tokenizer(given["texts"], padding=True, return_tensors="pt")
    assert sorted(batch) == given["inputs"], sorted(batch)
    with torch.no_grad():
        together = model(**batch).logits.squeeze(-1)
    torch.testing.assert_close(together, wanted, rtol=1e-5, atol=1e-5)
    for options in ({}, {"batch_size": len(given["texts"])}):
        score = pipeline("text-classification", model=given["merged"], function_to_apply="none", **options)
        found = torch.tensor([one["score"] for one in score(given["texts"])])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    try:
        AutoModelForSequenceClassification.from_pretrained(given["mixture"])
    except ValueError as error:
        assert "umm_llama" in str(error), error
    else:
        raise AssertionError("a mixture was loaded without ummrm")
    print("same scores", transformers.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
