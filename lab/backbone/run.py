"""Runs a study from a pretrained backbone: one arm over one block of seeds at a time, resumable after a kill.

A unit is a regime, an arm in a variation, a block of seeds and an optimiser; each finished one is a file. A worker
process of one thread takes one block of a regime at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..files import kept, prepare_output, write_atomically
from ..ratings.regime import ratings_block
from ..ratings.task import RatingsTaskConfig
from ..run import machine_facts
from ..store import COLUMNS, KEY, UnitStore, write_tables
from ..workers import Report, StudyError, locked, run_groups
from .arms import BackboneArms, OnStep
from .config import OPTIMISERS, BackboneStudy, Variation
from .data import Block
from .measures import COLUMNS as VALUES
from .measures import measure
from .ppo import policy_path, reward_of
from .regimes import language_block
from .training import train_dense

TABLES = {**COLUMNS, "runs": (*KEY, *VALUES), "timings": (*KEY, "seconds")}


@dataclass(frozen=True)
class BlockUnit:
    """What is run and kept as one, under best-of-n.

    Attributes:
        regime: the regime.
        arm: the arm's name in the tables, its variation included.
        first_seed: of the block.
        seeds: how many.
    """

    regime: str
    arm: str
    first_seed: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.regime}-{self.arm}-{self.first_seed}-{self.seeds}"


@dataclass(frozen=True)
class PolicyUnit(BlockUnit):
    """The same under PPO, over the first seeds of a block.

    A class of its own, so that files of best-of-n from before there was PPO still count.
    """

    optimiser: str = "ppo"

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.optimiser}"


@dataclass(frozen=True)
class _Work:
    unit: BlockUnit
    arm: str
    variation: Variation
    block: tuple[int, ...]
    optimiser: str
    fingerprint: str


@dataclass(frozen=True)
class BlockGroup:
    """What is still to be run of one block of seeds in one regime."""

    regime: str
    block: tuple[int, ...]
    works: tuple[_Work, ...]

    def __str__(self) -> str:
        return f"{self.regime}, seeds {self.block[0]} to {self.block[-1]}"


def run_backbone_study(
    study: BackboneStudy,
    output: str | Path,
    arms: tuple[str, ...] = (),
    optimisers: tuple[str, ...] = (),
    progress: bool = True,
) -> list[Path]:
    """Runs what is not yet done and writes the tables.

    Args:
        study: the study.
        output: folder for units, stages and tables; units already there are kept, damaged ones are run again.
        arms: only these; by default all.
        optimisers: only these; by default all that each arm has.
        progress: show a progress line: arm, seeds, steps, time left.

    Returns:
        The CSV files (`TABLES`). All but timings.csv depend on the study alone, not on the number of processes.

    Raises:
        ValueError: an unknown arm or optimiser, a folder that cannot be used, or one of another study's units.
        StudyError: a worker failed, or another process is at work in the folder.
    """
    for given, known, what in ((arms, tuple(study.arms), "arms"), (optimisers, OPTIMISERS, "optimisers")):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"`{what}` must be among {', '.join(known)}, got {', '.join(unknown)}.")
    tables = (f"{name}.csv" for name in (*TABLES, "comparisons", "choice"))
    files = (".lock", "study.json", *tables, "tables.md", "report.html")
    output = prepare_output(output, ("units", "stages"), files)
    with locked(output):
        store, works = UnitStore(output), _works(study, arms, optimisers)
        pending = [w for w in works if store.read(w.unit, w.fingerprint) is None]
        facts = {"study": study.to_dict(), "machine": machine_facts()}
        write_atomically(output / "study.json", json.dumps(facts, indent=1) + "\n")
        work = functools.partial(run_block, study, output)
        counts = {"name": f"{study.name}: units", "total": len(works), "left": len(pending), "progress": progress}
        run_groups(_groups(pending), work, study.processes, **counts, width=60)
        if not arms and not optimisers:  # others may be asked for next, which share stages
            shutil.rmtree(output / "stages", ignore_errors=True)
        rows = []
        for work in works:
            found = store.read(work.unit, work.fingerprint)
            if found is None:
                raise StudyError(
                    f"{store.path(work.unit)} was changed while the study ran; give the same command again."
                )
            rows += found["rows"]
        rows.sort(key=lambda row: row["seed"])  # stable: within a seed as the study has them
        return write_tables(output, rows, TABLES)


def make_block(
    study: BackboneStudy, regime: str, seeds: tuple[int, ...], folder: Path | None, on_step: OnStep
) -> Block:
    """The data of a block of seeds in a regime: where another kind of regime comes in."""
    task, trained = study.regimes[regime].task, study.regimes[regime].trained

    def said(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: on_step(stage, done, total)

    if isinstance(task, RatingsTaskConfig):
        block = ratings_block(task, seeds, on_step=said("frozen layers"))
    else:
        block = language_block(task, study.model, study.pretraining, seeds, folder, said("pretraining"))
    if trained is None:
        return block
    settings, run = study.optimisation, "start"  # of data in an order of its own
    common = (block, trained.steps, study.batch, trained.rate, settings, run)

    def make() -> dict:
        return {"parameters": train_dense(*common, on_step=said("start"))}

    start = make() if folder is None else kept(folder / f"start-{trained.steps}-{trained.rate:g}.pt", make)
    return dataclasses.replace(block, start=start["parameters"])


def _works(study: BackboneStudy, arms: tuple[str, ...], optimisers: tuple[str, ...]) -> list[_Work]:
    works = []
    for regime in study.regimes:
        for block in study.blocks:
            for arm in (name for name in study.arms_of(regime) if not arms or name in arms):
                for variation in study.variations(regime, arm):
                    name = study.run_name(arm, variation)
                    for optimiser in (o for o in study.optimisers(arm) if not optimisers or o in optimisers):
                        seeds = study.seeds_of(arm, block, optimiser)
                        if seeds:
                            kind = PolicyUnit if optimiser == "ppo" else BlockUnit
                            unit = kind(regime, name, block[0], seeds)
                            made_as = study.fingerprint(regime, arm, optimiser)
                            works.append(_Work(unit, arm, variation, block, optimiser, made_as))
    return works


def _groups(works: list[_Work]) -> list[BlockGroup]:
    """The works of each block and regime together, those of the first blocks first."""
    places = sorted(dict.fromkeys((work.block, work.unit.regime) for work in works), key=lambda place: place[0])
    return [
        BlockGroup(regime, block, tuple(w for w in works if (w.block, w.unit.regime) == (block, regime)))
        for block, regime in places
    ]


def run_block(study: BackboneStudy, output: Path, group: BlockGroup, report: Report) -> None:
    """Runs what is to be run of one block, writing each unit as it finishes."""
    last, where = 0.0, str(group)

    def on_step(stage: str, step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.3 or step == steps:
            last = time.monotonic()
            report("step", f"{where}: {stage}", step, steps)

    folder = output / "stages" / f"{group.regime}-{group.block[0]}-{len(group.block)}"
    block = make_block(study, group.regime, group.block, folder, on_step)
    makers, store = BackboneArms(study, group.regime, block, folder, on_step), UnitStore(output)
    for work in group.works:
        where = f"{group}: {work.unit.arm}"
        began = time.perf_counter()
        rows = _rows(study, work, makers)
        seconds = (time.perf_counter() - began) / len(rows)
        for row in rows:
            row["timings"] = {"seconds": seconds}
        store.write(work.unit, work.fingerprint, {"rows": rows})
        report("done")


def _rows(study: BackboneStudy, work: _Work, makers: BackboneArms) -> list[dict]:
    """Makes and measures one arm over one block: for each seed what `store.write_tables` takes."""
    models, block = makers.make(work.arm, work.variation), makers.block
    if work.optimiser == "best_of_n":
        found = measure(block, makers.scores(models), study.measure.fixed_kl)
        training, serving = models.training_flops.tolist(), models.serving_flops.tolist()
        for one, trained, served in zip(found, training, serving, strict=True):
            costs = {"parameters": models.served, "training_flops": trained, "serving_flops": served}
            one["values"] |= costs
    else:
        assert study.ppo is not None
        rewards = [reward_of(models, makers.member_scores(models), i) for i in range(work.unit.seeds)]
        found = [
            policy_path(block, i, reward, study.ppo, study.measure, makers.on_step) for i, reward in enumerate(rewards)
        ]
    key = {"regime": work.unit.regime, "arm": work.unit.arm, "optimiser": work.optimiser}
    return [{**key, "seed": seed, **one, "experts": []} for seed, one in zip(block.seeds, found, strict=False)]
