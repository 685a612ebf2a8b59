"""Tiny models in folders for the tests of saving, and what a reader finds there that knows nothing of our saves."""

import os

import pytest
import torch
from saving_child import make_model
from transformers import AutoModelForSequenceClassification

from ummrm.hf import replacing

OLD, NEW = 0, 1  # seeds of the model in the folder and of the one whose save is killed
# other files for the mixture, other contents under the same names for the merged model
SHARDS = {(OLD, False): "100KB", (NEW, False): "60KB", (OLD, True): "30KB", (NEW, True): "40KB"}


class _Models(dict):
    def __missing__(self, key):
        self[key] = make_model(*key)
        return self[key]


MODELS = _Models()  # by seed and whether merged, made when first used


def stock_load(folder, **options):
    """What a reader loads that knows nothing of interrupted saves, as a state dict; None where it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replacing, "settle", lambda target: None)
        try:
            return AutoModelForSequenceClassification.from_pretrained(folder, **options).state_dict()
        except (OSError, ValueError):  # the latter from AutoConfig, where there is no config.json
            return None


def same(state, model):
    ours = model.state_dict()
    return state is not None and state.keys() == ours.keys() and all(torch.equal(v, ours[k]) for k, v in state.items())


def loads_as(folder, model):
    return same(stock_load(folder), model)


def snapshot(folder):
    """Names, kinds, modes and contents of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            os.lstat(path).st_mode,
            path.read_bytes() if path.is_file() and not path.is_symlink() else None,
        )
        for path in folder.rglob("*")
    }
