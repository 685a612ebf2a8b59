"""Scores sequences with an exported reward model in a process where ummrm cannot be imported.

Run by path, in isolated mode (`python -I _stock_process.py request.json`); it must therefore import nothing of
ummrm. Prints one line of JSON.
"""

import importlib.abc
import json
import sys


class Forbidden(importlib.abc.MetaPathFinder):
    """Makes `import ummrm` fail even where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ummrm":
            raise ModuleNotFoundError(f"{name} is blocked in this process")
        return None


def blocked() -> list[str]:
    """Which of the ways into ummrm fail; all of them must."""
    found = []
    for name in ("ummrm", "ummrm._C", "ummrm.hf"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            found.append(name)
    return found


def main() -> None:
    sys.meta_path.insert(0, Forbidden())
    before = blocked()
    with open(sys.argv[1]) as file:
        request = json.load(file)

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(request["threads"])
    model, info = AutoModelForSequenceClassification.from_pretrained(request["folder"], output_loading_info=True)
    model.eval()
    batches = load_file(request["inputs"])
    scores = {}
    with torch.no_grad():
        for i in range(request["batches"]):
            inputs = {name: batches[f"{i}.{name}"] for name in ("input_ids", "attention_mask")}
            scores[str(i)] = model(**inputs).logits.squeeze(-1).contiguous()
    save_file(scores, request["scores"])
    print(
        json.dumps(
            {
                "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
                "model_type": model.config.model_type,
                "missing_keys": sorted(info["missing_keys"]),
                "unexpected_keys": sorted(info["unexpected_keys"]),
                "blocked_before": before,
                "blocked_after": blocked(),
                "loaded_ummrm_modules": sorted(name for name in sys.modules if name.partition(".")[0] == "ummrm"),
            }
        )
    )


if __name__ == "__main__":
    main()
