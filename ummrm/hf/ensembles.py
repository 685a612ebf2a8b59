"""Members of an ensemble and their scores: of one mixture, of one reward model, or of several with their tokenizers.

`ensemble_reward` makes them a reward function for TRL; distillation makes them a teacher. How scores combine is stated
in `nn/ensembles.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..nn.ensembles import UNCERTAINTY, check_rule, combine_scores
from ..nn.modes import evaluation_mode
from .configuration import UmmConfigMixin
from .loading import load_checkpoint
from .normalization import RewardNormalization, of_rewards, reward_normalization, score
from .sequence import by_sequence
from .sharding import check_runs, is_sharded, unpartitioned
from .texts import TEXT_FORMATS, Text, joined, known_tokenizer, same_tokenizer, texts_of, token_ids


def check_reward_model(model: Any, argument: str) -> None:
    """Raises unless `model` gives one score a sequence.

    Raises:
        TypeError: it is no model of transformers or has no sequence-classification head.
        ValueError: it has several labels.
    """
    name = type(model).__name__
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise TypeError(f"`{argument}` must be a reward model of transformers, got {name}; load one by its name.")
    if getattr(inner, "base_model", None) is inner or inner.get_output_embeddings() is not None:
        raise TypeError(
            f"`{argument}` must have a reward head, got a {type(inner).__name__} without one; start one with "
            "ummrm.reward_model(model, tokenizer), or ummrm.upcycle(model, config, new_head=True), and train it."
        )
    if getattr(config, "num_labels", 1) != 1:
        raise ValueError(
            f"`{argument}` must give one reward per sequence, got a {name} with num_labels={config.num_labels}; "
            "load it with num_labels=1."
        )


class Member:
    """One model of an ensemble: a mixture, whose members are scored in one pass, or a reward model.

    Args:
        model: it, or its folder or hub name: then it is loaded when it is scored with, and dropped after.
        tokenizer: its own; None takes that of the folder or name, or leaves the question open for a model in memory.
        argument: what the caller calls it, for messages.

    Attributes:
        tokenizer: its own, or None where it is not known.
        name: for people.
        argument: what the caller calls it.
    """

    def __init__(self, model: Any, tokenizer: Any = None, argument: str = "model") -> None:
        self.argument = argument
        self.path = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
        self.model: Any = None if self.path is not None else model
        if self.path is not None:
            tokenizer = AutoTokenizer.from_pretrained(self.path) if tokenizer is None else tokenizer
            self.name = Path(self.path).name if os.path.isdir(self.path) else self.path
        else:
            check_reward_model(model, argument)
            base = str(getattr(model.config, "_name_or_path", "") or "")
            self.name = type(model).__name__ + (f" ({Path(base).name})" if base else "")
        self.tokenizer = tokenizer

    @contextlib.contextmanager
    def loaded(self) -> Iterator[Any]:
        """The model, in memory inside the `with` block."""
        if self.model is not None:
            yield self.model
            return
        self.keep()
        try:
            yield self.model
        finally:
            self.model = None

    def keep(self) -> None:
        """Loads the model, if it is not there, to stay."""
        if self.model is None:
            assert self.path is not None
            with unpartitioned():
                model = load_checkpoint(self.path)
            check_reward_model(model, self.argument)
            self.model = model

    @property
    def width(self) -> int:
        """How many members one forward scores."""
        with self.loaded() as model:
            return model.config.upcycle_config.num_experts if has_members(model) else 1

    def check_reads(self, tokenizer: Any, student: Any) -> None:
        """Whether a model without a tokenizer of its own can be taken to read the student's tokens.

        Args:
            tokenizer: the student's.
            student: the model that they are of.

        Raises:
            ValueError: it can't: it has another vocabulary.

        Warns:
            UserWarning: nothing but the number of embeddings says so, or its folder's tokenizer makes other texts of
                the same vocabulary.
        """
        if self.tokenizer is not None:
            return
        known = known_tokenizer(self.model)
        remedy = f"to score its own tokens give its tokenizer as `{self.argument.partition('[')[0]}_processing_class`"
        if known is not None and known.get_vocab() == tokenizer.get_vocab():
            if not same_tokenizer(known, tokenizer):
                warnings.warn(
                    f"{self.name} scores the student's tokens, and the tokenizer beside it has another chat template, "
                    f"end token or rules; {remedy}.",
                    stacklevel=3,
                )
            return
        theirs, ours = (model.get_input_embeddings().num_embeddings for model in (self.model, student))
        if known is not None or theirs != ours:
            what = "another vocabulary" if known is not None else f"{theirs} tokens where the student has {ours}"
            raise ValueError(
                f"`teacher_processing_class` must be given for {self.name}, which has {what}; load its tokenizer "
                "with AutoTokenizer (or give the student's, if it is the same)."
            )
        if not _same_origin(self.model, student):
            warnings.warn(
                f"{self.name} is taken to read the student's tokens, since nothing but the number of embeddings is "
                f"known of it; {remedy}.",
                stacklevel=3,
            )

    def digest(self, ids: Sequence[Sequence[int]]) -> str:
        """SHA-256 of the model (class, configuration, weights) and of the tokens of all texts in their order."""
        found = hashlib.sha256()
        with self.loaded() as model:
            plain = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
            plain = {k: v for k, v in plain.items() if k not in ("_name_or_path", "transformers_version")}
            found.update(json.dumps([type(model).__name__, plain], sort_keys=True, default=str).encode())
            for name, tensor in sorted(model.state_dict().items()):
                found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        found.update(texts_digest(ids).encode())
        return found.hexdigest()

    def scores(self, ids: Sequence[Sequence[int]], batch_size: int, **options: Any) -> Tensor:
        """Raw scores fp64 [N, members]; see `score_texts`."""
        with self.loaded() as model:
            limit = getattr(self.tokenizer, "model_max_length", None)
            long = sum(len(text) > limit for text in ids) if limit is not None else 0
            if long:
                raise ValueError(
                    f"`{self.argument}` {self.name} takes texts of at most {limit} tokens, and {long} of {len(ids)} "
                    "are longer; shorten or drop them."
                )
            found = score_texts(model, ids, batch_size, **options)
        bad = (~found.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"`{self.argument}` must give finite scores, and {self.name} gives NaN or infinity for {len(bad)} of "
                f"{len(ids)} texts, first text {bad[0]}; score with another dtype, or leave the model out."
            )
        return found


def _same_origin(model: Any, other: Any) -> bool:
    """Whether two models come from one checkpoint, or from no known one: models of the caller's own making."""
    names = [str(getattr(one.config, "_name_or_path", "") or "") for one in (model, other)]
    return names[0] == names[1] or not names[0]


def texts_digest(ids: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the tokens of all texts in their order."""
    found = hashlib.sha256()
    for text in ids:
        found.update(array("i", [len(text), *text]).tobytes())
    return found.hexdigest()


def members_of(models: Any, tokenizers: Any = None, argument: str = "models") -> list[Member]:
    """Members of one model or several, each with its tokenizer.

    Raises:
        TypeError: a model is none.
        ValueError: no model, one twice, or not one tokenizer for each.
    """
    several = isinstance(models, (list, tuple))
    models = list(models) if several else [models]
    if not models:
        raise ValueError(f"`{argument}` must hold at least one reward model, got none.")
    if len({id(model) for model in models}) < len(models):
        raise ValueError(f"`{argument}` must hold each model once, got one twice, which would count for two.")
    if not isinstance(tokenizers, (list, tuple)):
        tokenizers = [tokenizers] * len(models)
    if len(tokenizers) != len(models):
        raise ValueError(
            f"one tokenizer, or one for each of the {len(models)} models of `{argument}`, must be given, got "
            f"{len(tokenizers)}; None stands for one that is not given."
        )
    pairs = zip(models, tokenizers, strict=True)
    return [Member(m, t, f"{argument}[{i}]" if several else argument) for i, (m, t) in enumerate(pairs)]


def has_members(model: Any) -> bool:
    """Whether one forward of `model` scores several members: a mixture whose experts get whole sequences."""
    config = getattr(model, "get_base_model", lambda: model)().config
    return isinstance(config, UmmConfigMixin) and by_sequence(config)


@torch.no_grad()
def score_texts(
    model: Any,
    ids: Sequence[Sequence[int]],
    batch_size: int,
    *,
    share: tuple[int, int] = (0, 1),
    device: torch.device | None = None,
    progress: str | None = None,
) -> Tensor:
    """Raw scores of texts, in evaluation mode, without a gradient.

    Texts go into batches by length and content, so that a text's batch, and with it the last bits of its score, depends
    neither on the order of the texts nor on how many processes share the work.

    Args:
        model: a reward model, or a mixture with `member_scores`. Its modes are as before afterwards.
        ids: tokens of each text.
        batch_size: texts a forward.
        share: (rank, processes): only every `processes`-th batch is scored, and other texts get 0.
        device: where to score; the model is moved there and back. None leaves it where it is.
        progress: what a progress bar is called; None shows none.

    Returns:
        fp64 [N, members], on the CPU.

    Raises:
        ValueError: a text without tokens, a model that names no padding token, or one that is partitioned and has no
            engine yet.
    """
    empty = [i for i, text in enumerate(ids) if not len(text)]
    if empty or not len(ids):
        raise ValueError(f"texts must have tokens, got {f'none in text {empty[0]}' if empty else 'no texts'}.")
    text_config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    padding = getattr(text_config, "pad_token_id", None)
    if padding is None:
        raise ValueError(
            f"a {type(model).__name__} must name its padding token to score a batch, and its configuration has none; "
            "set model.config.pad_token_id to the tokenizer's."
        )
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), array("i", ids[i]).tobytes()))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rank, processes = share
    own = len(batches[rank::processes])
    # one without work learns so how many members there are; of a shared model all processes run every forward
    rounds = -(-len(batches) // processes) if is_sharded(model) else max(own, 1)
    mine = (batches[rank::processes] + batches[:1] * rounds)[:rounds]
    check_runs(model)
    several, found = has_members(model), None
    with _moved(model, device), evaluation_mode(model):
        where = next(model.parameters()).device
        for number, batch in enumerate(transformers_logging.tqdm(mine, desc=progress, disable=progress is None)):
            # an array costs a list of integers a tenth of what a tensor does
            rows = [torch.frombuffer(array("i", ids[i]), dtype=torch.int32) for i in batch]
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).long()
            live = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
            inputs = {"input_ids": padded.to(where), "attention_mask": live.long().to(where)}
            scores = model.member_scores(**inputs) if several else score(model, inputs)[:, None]
            found = torch.zeros(len(ids), scores.shape[1], dtype=torch.float64) if found is None else found
            if number < own:
                found[batch] = scores.cpu().double()
    assert found is not None
    return found


@contextlib.contextmanager
def _moved(model: Any, device: torch.device | None) -> Iterator[None]:
    before = next(model.parameters()).device
    fixed = device is None or device == before or getattr(model, "hf_device_map", None) is not None
    if fixed or getattr(model, "is_quantized", False):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


class EnsembleReward:
    """A reward function in TRL's form, made by `ensemble_reward`.

    Attributes:
        normalization: of each member, in order.
        combine: the rule.
        uncertainty: UWO's weight.
    """

    def __init__(
        self, members: list[Member], combine: str, uncertainty: float, batch_size: int, name: str | None
    ) -> None:
        self.members, self.combine, self.uncertainty, self.batch_size = members, combine, uncertainty, batch_size
        self.normalization: list[RewardNormalization] = []
        self.__name__ = name or f"ensemble_{combine}"

    def member_scores(self, texts: Sequence[Text]) -> Tensor:
        """Raw scores of texts (strings or conversations), fp64 [N, members]."""
        columns = [
            member.scores([token_ids(member.tokenizer, text) for text in texts], self.batch_size)
            for member in self.members
        ]
        return torch.cat(columns, 1)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """The rewards of completions, plain or conversational; other columns that TRL hands in are left unread."""
        if not len(completions):
            return []
        texts = [joined(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scales = [(n.mean, n.std) for n in self.normalization]
        scores = self.member_scores(texts)
        return combine_scores(scores, self.combine, uncertainty=self.uncertainty, scales=scales).tolist()


def ensemble_reward(
    models: Any,
    tokenizer: Any,
    *,
    combine: str = "mean",
    uncertainty: float = UNCERTAINTY,
    normalization: Sequence[RewardNormalization] | None = None,
    reference: Iterable[Any] | None = None,
    batch_size: int = 16,
    name: str | None = None,
    device: str | torch.device | None = None,
) -> EnsembleReward:
    """A reward function for TRL (`reward_funcs=[...]` of GRPOTrainer and RLOOTrainer) from an ensemble's members.

    Every member's score is normalised, then they combine (Coste et al. 2023, arXiv 2310.02743). Texts are made as TRL's
    RewardTrainer makes them: a conversation by the chat template, plain text with the end-of-sequence token.

    Args:
        models: a mixture whose experts get whole sequences, a reward model, or a list of such; folders and hub names
            too.
        tokenizer: theirs, or one for each of `models`.
        combine: `"mean"`, `"worst"` or `"uwo"`.
        uncertainty: UWO's weight of the variance over members.
        normalization: one for each member (a mixture has as many as experts).
        reference: texts to measure it on, once, instead: rows as in a data set (prompt and completion, messages, text,
            preference pairs), strings or conversations. With neither, every model's own (`ummrm.reward_normalization`)
            is used; a single reward model without one is taken as it is.
        batch_size: texts a forward.
        name: what TRL logs it as; by default `ensemble_<combine>`.
        device: where the models score: they are moved there at once, to stay (TRL moves the reward models that it is
            given, and no functions). None leaves them where they are: models given by their path on the CPU.

    Returns:
        A callable `(prompts, completions, **columns) -> list[float]`; its `normalization` says what was measured. A
        text longer than the tokenizer's `model_max_length` is an error when it comes: bound prompts and completions.

    Raises:
        TypeError: a model has no reward head, or `normalization` or `reference` are of another kind.
        ValueError: an unknown rule, several labels, no tokenizer, not one normalisation for each member, none to be
            had, or scores that are not finite.
    """
    check_rule(combine, uncertainty)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
    members = members_of(models, tokenizer)
    missing = [member.name for member in members if member.tokenizer is None]
    if missing:
        raise ValueError(f"`tokenizer` must be given for {missing[0]}, got None; load it with AutoTokenizer.")
    for member in members:
        member.keep()
        if device is not None:
            member.model.to(device)
    reward = EnsembleReward(members, combine, uncertainty, batch_size, name)
    if normalization is not None:
        if reference is not None:
            raise ValueError("`reference` must be None where `normalization` is given; leave one of them out.")
        reward.normalization = list(normalization)
        other = [one for one in reward.normalization if not isinstance(one, RewardNormalization)]
        if other:
            raise TypeError(
                f"`normalization` must hold a RewardNormalization for each member, got {other[0]!r}; make one of mean "
                "and standard deviation: ummrm.RewardNormalization(mean, std)."
            )
    elif reference is not None:
        if isinstance(reference, (str, Mapping)):
            raise TypeError(
                f"`reference` must be a list of texts or a data set of rows, got a {type(reference).__name__}; put a "
                "text into a list, and of several splits name one."
            )
        texts = [text for row in reference for text in _reference_texts(row)]
        if not texts:
            raise ValueError("`reference` must hold texts to measure the members' scores on, got none.")
        reward.normalization = [of_rewards(column) for column in reward.member_scores(texts).unbind(1)]
    else:
        reward.normalization = [_own_normalization(member, single=len(members) == 1) for member in members]
    expected = sum(member.width for member in members)
    if len(reward.normalization) != expected:
        raise ValueError(
            f"`normalization` must hold one for each of the {expected} members, got {len(reward.normalization)}."
        )
    return reward


def _reference_texts(row: Any) -> list[Text]:
    if isinstance(row, Mapping) and {"input_ids", "chosen_ids"} & set(row):
        raise ValueError(
            f"`reference` must be text, of which each model has its own tokens, got tokens; give {TEXT_FORMATS}."
        )
    return texts_of(row) if isinstance(row, Mapping) else [row]


def _own_normalization(member: Member, single: bool) -> RewardNormalization:
    known = None if has_members(member.model) else reward_normalization(member.model)
    if known is None and single and member.width == 1:
        known = RewardNormalization(0.0, 1.0)
    if known is None:
        raise ValueError(
            f"`normalization` or `reference` must be given: {member.name} has no normalisation of its own for each "
            "member, and scores on different scales don't combine; give texts as `reference`, or one "
            "RewardNormalization for each member."
        )
    return known
