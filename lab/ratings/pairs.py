"""Human ratings as files that any reward model's trainer reads: pairs, held-out pairs, texts without labels.

As in the regime of studies a pair's label is one person's rating of one text against one person's of the other, while
held-out pairs go by the mean over all who rated.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..files import write_atomically
from .archive import CACHE, fetched_archive
from .task import RatingsTaskConfig, draw
from .texts import read_ratings


def write_pairs(config: RatingsTaskConfig, seed: int, folder: Path, cache: Path = CACHE) -> list[Path]:
    """Writes `train.jsonl`, `held_out.jsonl` (chosen, rejected) and `texts.jsonl` (text) into a folder.

    Args:
        config: sizes; `max_tokens` counts words here.
        seed: of what is drawn.
        folder: made if missing.
        cache: where the archive of ratings is kept.
    """
    rated = read_ratings(Path(config.archive) if config.archive else fetched_archive(cache), config.source)
    kept = [
        i
        for i, (text, ratings) in enumerate(zip(rated.texts, rated.ratings, strict=True))
        if len(text.split()) <= config.max_tokens and len(ratings) >= config.min_raters
    ]
    rated = rated.select(kept)
    drawn = draw(config, rated, torch.tensor([len(text.split()) for text in rated.texts]), seed)

    def pairs(which: torch.Tensor) -> list[dict[str, str]]:
        return [{"chosen": rated.texts[a], "rejected": rated.texts[b]} for a, b in which.tolist()]

    rows = {
        "train": pairs(drawn.train),
        "held_out": pairs(drawn.test),
        "texts": [{"text": rated.texts[i]} for i in drawn.unlabelled.tolist()],
    }
    paths = []
    for name, found in rows.items():
        paths.append(folder / f"{name}.jsonl")
        write_atomically(paths[-1], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    return paths
