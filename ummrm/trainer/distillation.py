"""Distillation: a reward model regresses on the combined scores of a teacher's members, on texts without labels.

On TRL's RewardTrainer: models, adapters, tokenizers, loops, checkpoints and cards are its own business. What a teacher
is and how its members combine is stated in `hf/ensembles.py` and `nn/ensembles.py`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import RewardConfig

from ..files import write_json
from ..hf import card
from ..hf.ensembles import Member, check_reward_model, members_of, score_texts, texts_digest
from ..hf.normalization import RewardNormalization, of_rewards, set_reward_normalization
from ..hf.sharding import is_sharded, partitions, shared
from ..hf.texts import same_tokenizer
from ..nn.ensembles import UNCERTAINTY, TargetScale, check_rule
from .base import UmmTrainer, phase_of
from .lengths import Dropped, LengthFilter, report
from .teacher_scores import FOLDER, Agreement, KeptScores, gap
from .texts import GIVEN, TextCollator, given_scores, tokens_of_rows

RECORD = "distillation.json"


@dataclass
class UmmDistillConfig(RewardConfig):
    """`trl.RewardConfig` with how a teacher's members combine, and one pass over the texts.

    The learning rate stays RewardConfig's, 1e-4, that of a dense reward model: in the laboratory's search half of the
    dense model's best rate did, and 120 steps of 32 texts, one pass.

    Attributes:
        combine: `"mean"`, `"worst"` or `"uwo"` (Coste et al. 2023, arXiv 2310.02743).
        uncertainty: UWO's weight of the variance over members.
        teacher_batch_size: texts a forward of the teacher; None is `per_device_eval_batch_size`.
        num_train_epochs: passes over the texts.
    """

    combine: str = field(default="mean", metadata={"help": "How members' scores combine: mean, worst or uwo."})
    uncertainty: float = field(default=UNCERTAINTY, metadata={"help": "UWO's weight of the variance over members."})
    teacher_batch_size: int | None = field(default=None, metadata={"help": "Texts a forward of the teacher."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the texts."})

    def __post_init__(self):
        super().__post_init__()
        check_rule(self.combine, self.uncertainty)
        if self.teacher_batch_size is not None and self.teacher_batch_size < 1:
            raise ValueError(f"`teacher_batch_size` must be at least 1 or None, got {self.teacher_batch_size!r}.")
        if self.center_rewards_coefficient is not None:
            raise ValueError(
                "`center_rewards_coefficient` must be None in distillation, which compares no two answers, got "
                f"{self.center_rewards_coefficient!r}; leave it out."
            )


class UmmDistillTrainer(UmmTrainer):
    """Distils a teacher's scores into one reward model, on TRL's machinery.

    The student is a stock reward model, normally the merged one; the teacher the mixture that it was merged from, or
    any reward models. Each member's scores are normalised over the training texts, then combined and standardised: the
    targets. The loss is the mean squared difference between them and the student's own scores, normalised by the mean
    and spread that they have over the training texts at the start. So teachers of any scale will do, no head needs to
    be rescaled, and the student's raw scores keep their scale. That normalisation is kept in the student's
    configuration: `ummrm.score(student, batch, normalized=True)` is on the targets' scale (mean 0, standard deviation 1
    over the training texts), and `ummrm.fold_reward_normalization` builds it into the head.

    The teacher scores once, before training: its scores are the same for every pass, and then it needs no memory. They
    are kept in `<output_dir>/teacher_scores`, under a digest of texts and weights, so that a run that is started again
    computes none anew.

    Texts are rows with prompt and completion, messages, text, preference pairs (both answers become texts), or tokens.
    Rows may bring a teacher's scores along, as a number or a list of members' numbers in `teacher_score` (of a pair:
    `chosen_teacher_score` and `rejected_teacher_score`); then no teacher is given.

    Logged: `loss` (mean squared difference), `teacher_gap` (its root), `teacher_correlation`, `teacher_agreement` (the
    share of pairs of texts in the teacher's order), with the evaluation set's prefix at evaluation.
    `trainer.gap_at_start` is the gap over the training texts before training.

    Args:
        model: the student, or its path; a PEFT model, or `peft_config`, will do.
        args: `UmmDistillConfig`; by default one that saves to `<model>-Distilled`.
        rest: further positional arguments of `RewardTrainer`.
        teacher: a mixture whose experts get whole sequences, a reward model, or a list of such; paths too. Where the
            engine shares the student's weights (FSDP, ZeRO-3), processes share those of a teacher given by its path.
        teacher_processing_class: the tokenizer of the teacher, or one for each of several (None: the student's). Texts
            are rendered anew by a tokenizer, and its chat template, that is not the student's.
        kwargs: keyword arguments of `RewardTrainer`; data sets of known length.

    Raises:
        TypeError: the student has experts or no reward head; a teacher has no reward head; the data is a stream.
        ValueError: no teacher, the student as its own teacher, several labels, another tokenizer that is not given,
            scores that are not finite or all the same, rows that hold no text.
    """

    _name = "UMM-RM distillation"
    _config_class = UmmDistillConfig
    _output_suffix = "Distilled"
    _unit = "texts"
    args: UmmDistillConfig

    def __init__(
        self, model, args: UmmDistillConfig | None = None, *rest, teacher=None, teacher_processing_class=None, **kwargs
    ) -> None:
        if args is not None and not isinstance(args, UmmDistillConfig):
            raise TypeError(f"`args` must be an UmmDistillConfig, got {type(args).__name__}.")
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        given = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        paths = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in given]
        if teacher is not None and any(one is model or (isinstance(one, str) and one == model) for one in paths):
            raise ValueError(
                "`teacher` must be another model than the student, which can't learn from its own scores; give the "
                "mixture that it was merged from, or other reward models."
            )
        self._members = [] if teacher is None else members_of(teacher, teacher_processing_class, "teacher")
        self._render: list[Member] = []  # members whose tokenizer is not the student's
        self.teacher_scale: TargetScale | None = None
        self.gap_at_start: float | None = None
        self._student: RewardNormalization | None = None
        self._source = ""  # digest of training texts and teacher
        self._agreement = {"train": Agreement(), "eval": Agreement()}
        own_collator = kwargs.get("data_collator") is None and not rest
        super().__init__(model, args, *rest, **kwargs)
        if own_collator:
            trls: Any = self.data_collator
            self.data_collator = TextCollator(trls.pad_token_id, trls.pad_to_multiple_of)
        for member in self._members:
            member.check_reads(self.processing_class, self._network)
        first, total = self.is_world_process_zero(), self._sum_over_processes
        self._kept = KeptScores(Path(str(self.args.output_dir)) / FOLDER, first, total)
        self.train_dataset = self._with_targets(self.train_dataset, "train")
        sets: Any = self.eval_dataset
        if isinstance(sets, dict):
            self.eval_dataset = {name: self._with_targets(one, name) for name, one in sets.items()}
        elif sets is not None:
            self.eval_dataset = self._with_targets(sets, "eval")

    def _check_model(self, model: nn.Module) -> None:
        phase = phase_of(model)
        if phase is not None:
            remedy = "ummrm.merge(model)" if phase == "merging" else "ummrm.merge(ummrm.prepare_merge(model))"
            raise TypeError(
                f"`model` must be a stock reward model, got a {type(model).__name__} with experts; merge it first: "
                f"student = {remedy}, and give the mixture as `teacher`."
            )
        check_reward_model(model, "model")

    # ---- data --------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if getattr(dataset, "_fingerprint", None) in self._filtered:
            return dataset  # TRL hands data that is ready in again at every evaluation
        ready = self._tokenised(dataset, processing_class, args, dataset_name)
        has_scores = "given" in ready.column_names
        if has_scores and self._members:
            raise ValueError(
                f"`teacher` must be None where the data has scores of its own (`{GIVEN}`), as the {dataset_name} set; "
                "leave one of them out."
            )
        if not has_scores and not self._members:
            raise ValueError(
                f"`teacher` must be a mixture, a reward model or a list of reward models, got None, and the "
                f"{dataset_name} set has no `{GIVEN}`; give a teacher, or a score with each text."
            )
        return ready if self.teacher_scale is None else self._with_targets(ready, dataset_name)

    def _tokenised(self, dataset, processing_class, args, name: str) -> Dataset:
        """Tokens of every text that fits: `input_ids`, `teacher_ids` and, where the rows bring scores, `given`."""
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"the {name} set must be a datasets.Dataset, whose texts the teacher scores once, got "
                f"{type(dataset).__name__}; of a stream take the first n: Dataset.from_list(list(stream.take(n)))."
            )
        self._render = [
            m for m in self._members if m.tokenizer is not None and not same_tokenizer(m.tokenizer, processing_class)
        ]
        with args.main_process_first(desc=f"tokenising the {name} set"):
            texts = dataset.map(
                tokens_of_rows,
                batched=True,
                remove_columns=dataset.column_names,
                num_proc=args.dataset_num_proc,
                fn_kwargs={"tokenizer": processing_class, "others": [(m.name, m.tokenizer) for m in self._render]},
                desc=f"Tokenizing {name} dataset",
            )
            if args.max_length is None:
                fits = texts
            else:
                fits = texts.filter(LengthFilter(args.max_length, keys=("input_ids",)), num_proc=args.dataset_num_proc)
        self.long_pairs[name] = Dropped(len(texts) - len(fits), len(texts), unit=self._unit)
        if args.max_length is not None:
            report(name, self.long_pairs[name], args.max_length, warn=args.process_index == 0)
        if not len(fits):
            raise ValueError(f"the {name} set must hold texts, got none.")
        return fits

    def _with_targets(self, texts: Any, name: str) -> Dataset:
        """The set with a column of targets; the first one, of the training texts, fixes their scale."""
        args, keys, columns = self.args, [], []
        for member in self._members:
            if member in self._render:
                index = self._render.index(member)
                ids = [array("i", row[index]) for row in texts["teacher_ids"]]
            else:
                ids = _tokens(texts)
            with member.loaded():
                keys.append(member.digest(ids))
                columns.append(self._kept.get(keys[-1], functools.partial(self._member_scores, member, ids, name)))
        if not self._members:
            columns = [given_scores(texts["given"][:], name)]
            keys = [texts_digest(_tokens(texts)), repr(columns[0].tolist())]
        scores = torch.cat(columns, 1)
        if self.teacher_scale is None:
            names = [m.name for m, c in zip(self._members, columns, strict=False) for _ in range(c.shape[1])]
            names = names or [f"`{GIVEN}`"] * scores.shape[1]
            self.teacher_scale = TargetScale.measured(scores, args.combine, args.uncertainty, names)
            settled = json.dumps([keys, args.combine, args.uncertainty]).encode()
            self._source = hashlib.sha256(settled).hexdigest()
        if scores.shape[1] != len(self.teacher_scale.members):
            raise ValueError(
                f"the {name} set must have scores of as many members as the training set, "
                f"{len(self.teacher_scale.members)}, got {scores.shape[1]}."
            )
        targets = self.teacher_scale.targets(scores, args.combine, args.uncertainty)
        drop = [column for column in texts.column_names if column != "input_ids"]
        ready = texts.remove_columns(drop).add_column("target", targets.tolist())
        self._filtered.add(ready._fingerprint)
        return ready

    def _member_scores(self, member: Member, ids: list[array], name: str) -> Tensor:
        """This process's part of a member's scores; one that is loaded for them alone is shared as the student is."""
        batch_size = self.args.teacher_batch_size or self.args.per_device_eval_batch_size
        device = self.accelerator.device
        more: Any = {"device": device, "progress": self._progress(member.name, name)}
        shares = self.is_fsdp_enabled or partitions() or is_sharded(self._network)
        shares = shares and member.path is not None and self.args.world_size > 1
        with shared(member.model, device) if shares else contextlib.nullcontext():
            return member.scores(ids, batch_size, share=(self.args.process_index, self.args.world_size), **more)

    def _progress(self, teacher: str, name: str) -> str | None:
        shown = not self.args.disable_tqdm and self.is_local_process_zero()
        return f"{teacher} scores the {name} set" if shown else None

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns: Any = ["input_ids", "target"]

    # ---- the student's scale -----------------------------------------------------------------------------------

    def _student_scores(self, ids: list[array]) -> Tensor:
        """The student's raw scores, fp64 [N], on every process."""
        batch_size, sharing = self.args.per_device_eval_batch_size, self.get_tp_size()  # which run one batch together
        share = (self.args.process_index // sharing, self.args.world_size // sharing)
        shown = self._progress("the student", "train")
        scores = score_texts(self._network, ids, batch_size, share=share, progress=shown)
        return self._sum_over_processes(scores).cpu().double().squeeze(1) / sharing

    def _measure_student(self) -> RewardNormalization:
        data: Any = self.train_dataset
        scores = self._student_scores(_tokens(data))
        try:
            student = of_rewards(scores)
        except ValueError as error:
            raise ValueError(
                "`model` must score the training texts differently, with finite numbers, so that its scale can be "
                f"measured ({error}); a fresh head must not be zero."
            ) from error
        self.gap_at_start = gap(student(scores), torch.tensor(data["target"][:], dtype=torch.float64))
        return student

    def normalize_rewards(self, dataset=None) -> RewardNormalization:
        """As `UmmTrainer.normalize_rewards`, over texts; it replaces the scale that distillation has stated."""
        if dataset is None:
            texts: Any = self.train_dataset
        else:
            texts = self._tokenised(dataset, self.processing_class, self.args, "normalization")
        normalization = of_rewards(self._student_scores(_tokens(texts)))
        set_reward_normalization(self._network, normalization)
        return normalization

    # ---- training ----------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self._network.training else "eval"
        inputs = dict(inputs)
        targets = inputs.pop("target")
        assert self._student is not None
        outputs = model(**inputs, use_cache=False)
        scores = self._student(outputs.logits.squeeze(-1))
        loss = (scores - targets).square().mean()
        # of all processes, without the texts that fill up the last batch of an evaluation
        rows = torch.stack([outputs.logits.detach().squeeze(-1).float(), targets.float()], dim=1)
        all_rewards, all_targets = self._gathered_rows(rows).unbind(1)
        self._rewards[mode].add(all_rewards)
        all_scores = self._student(all_rewards)
        self._agreement[mode].add(all_scores, all_targets)
        if mode == "eval":
            self._evaluated.append((all_scores - all_targets).square())
        return (loss, outputs) if return_outputs else loss

    def _phase_metrics(self, mode: str) -> dict[str, float]:
        return self._agreement[mode].flush()

    def _forget(self, mode: str) -> None:
        super()._forget(mode)
        self._agreement[mode] = Agreement()

    def evaluate(self, *args, **kwargs):
        self._student = self._student or self._measure_student()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        self._student = self._student or self._measure_student()
        return super().predict(*args, **kwargs)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if not resume_from_checkpoint:
            self._student = self._measure_student()
            set_reward_normalization(self._network, self._student)
        # not UmmTrainer's own, which drops a normalisation: this one stays true
        done = super(UmmTrainer, self).train(resume_from_checkpoint, *args, **kwargs)
        if self.is_world_process_zero() and not hasattr(self._network, "peft_config"):
            card.remember(self.accelerator.unwrap_model(self.model), self._card())
        return done

    def _read_checkpoint(self, folder: str) -> None:
        path = Path(folder) / RECORD
        if not path.is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must be a checkpoint of this trainer, and {folder} has no "
                f"{RECORD}; resume with the trainer that wrote it."
            )
        record = json.loads(path.read_text())
        if record["source"] != self._source:
            raise ValueError(
                f"`resume_from_checkpoint` must be of the same texts, teacher and `combine`, and {path} was written "
                "with others; resume with those, or start anew."
            )
        self._student, self.gap_at_start = RewardNormalization(**record["student"]), record["gap_at_start"]
        set_reward_normalization(self._network, self._student)
        super()._read_checkpoint(folder)

    # ---- what is saved -----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `RewardTrainer.save_model`, with a record of teacher and scales, and the card of a finished model."""
        folder, first = (
            Path(str(self.args.output_dir if output_dir is None else output_dir)),
            self.is_world_process_zero(),
        )
        if first:  # before the weights: a checkpoint that has them can be resumed
            write_json(folder / RECORD, self._record(), indent=2)
        super().save_model(output_dir, _internal_call)
        if first and not _internal_call:
            card.write(folder, self._card(), previous=folder)

    def _record(self) -> dict[str, Any]:
        assert self.teacher_scale is not None
        return {
            "teacher": self._teacher_names(),
            "members": [{"mean": mean, "std": std} for mean, std in self.teacher_scale.members],
            "combine": self.args.combine,
            "uncertainty": self.args.uncertainty,
            "source": self._source,
            "student": None if self._student is None else {"mean": self._student.mean, "std": self._student.std},
            "gap_at_start": self.gap_at_start,
        }

    def _teacher_names(self) -> list[str]:
        return [member.name for member in self._members] or [f"scores of the data (`{GIVEN}`)"]

    def _card(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        before = card.recall(model) or card.of_folder(str(getattr(model.config, "_name_or_path", "") or ""))
        return card.with_notes(before, type(model).__name__, self.training_notes())

    def training_notes(self) -> str:
        assert self.teacher_scale is not None
        told: dict[str, object] = {
            "teacher": ", ".join(self._teacher_names()),
            "members": len(self.teacher_scale.members),
            "combined by": self.args.combine + (f", {self.args.uncertainty}" if self.args.combine == "uwo" else ""),
        }
        if self.gap_at_start is not None:
            told["gap to the teacher at the start, in its standard deviations"] = f"{self.gap_at_start:.4g}"
            if gaps := [entry["teacher_gap"] for entry in self.state.log_history if "teacher_gap" in entry]:
                told["the same in the last logged steps"] = f"{gaps[-1]:.4g}"
        return f"## Distillation\n\n{card.settings_table(told)}\n\n{super().training_notes()}"


def _tokens(texts: Any) -> list[array]:
    """Of every text, in 4 bytes a token where Python's own numbers take up to 36."""
    return [array("i", row) for row in texts["input_ids"]]


def distill(
    student,
    teacher,
    dataset,
    processing_class=None,
    args: UmmDistillConfig | None = None,
    *,
    resume_from_checkpoint: bool | str | None = None,
    **kwargs: Any,
):
    """Distils a teacher into a reward model, in one call; `UmmDistillTrainer` says what happens and what is refused.

    Args:
        student: the reward model that learns, in place: normally `ummrm.merge(moe)`.
        teacher: a mixture whose experts get whole sequences, a reward model, or a list of such; None where the data
            has scores.
        dataset: texts without labels.
        processing_class: the student's tokenizer; None loads that of the folder or name that it comes from.
        args: `UmmDistillConfig`.
        resume_from_checkpoint: True goes on from the last checkpoint of `args.output_dir`.
        kwargs: further keyword arguments of `UmmDistillTrainer`.

    Returns:
        The student (wrapped by PEFT under `peft_config`), in evaluation mode; `ummrm.save_pretrained` saves it with a
        card that says what it was taught by.

    Raises:
        TypeError: as `UmmDistillTrainer`.
        ValueError: as `UmmDistillTrainer`, or there is no tokenizer beside the student.
    """
    config = getattr(student, "config", None)
    if processing_class is None and config is not None and not getattr(config, "_name_or_path", ""):
        raise ValueError(
            "`processing_class` must be the student's tokenizer, got None, and no folder or name of the student's is "
            "known that would have one; give it."
        )
    trainer = UmmDistillTrainer(
        student, args, teacher=teacher, train_dataset=dataset, processing_class=processing_class, **kwargs
    )
    trainer.train(resume_from_checkpoint)
    return trainer.accelerator.unwrap_model(trainer.model).eval()
