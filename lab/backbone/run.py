"""Runs a study from a pretrained backbone: one arm over one block of seeds at a time, resumable after a kill.

A unit is a regime, an arm in a variation and a block of seeds; each finished one is a file. One process, one thread.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..files import kept, prepare_output, write_atomically
from ..ratings.regime import ratings_block
from ..ratings.task import RatingsTaskConfig
from ..run import StudyError, locked, machine_facts, minutes
from ..store import COLUMNS, KEY, UnitStore, write_tables
from .arms import BackboneArms, OnStep
from .config import BackboneStudy, Variation
from .data import Block
from .measures import COLUMNS as VALUES
from .measures import measure
from .regimes import language_block
from .training import train_dense

TABLES = {**COLUMNS, "runs": (*KEY, *VALUES), "timings": (*KEY, "seconds")}


@dataclass(frozen=True)
class BlockUnit:
    """What is run and kept as one.

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
class _Work:
    unit: BlockUnit
    arm: str
    variation: Variation
    block: tuple[int, ...]


def run_backbone_study(
    study: BackboneStudy,
    output: str | Path,
    arms: tuple[str, ...] = (),
    progress: bool = True,
) -> list[Path]:
    """Runs what is not yet done and writes the tables.

    Args:
        study: the study.
        output: folder for units, stages and tables; units already there are kept, damaged ones are run again.
        arms: only these; by default all.
        progress: show a progress line: arm, seeds, steps, time left.

    Returns:
        The CSV files (`TABLES`). All but timings.csv depend on the study alone.

    Raises:
        ValueError: an unknown arm, a folder that cannot be used, or one of another study's units.
        StudyError: another process is at work in the folder.
    """
    if unknown := sorted(set(arms) - set(study.arms)):
        raise ValueError(f"`arms` must be among {', '.join(study.arms)}, got {', '.join(unknown)}.")
    tables = (f"{name}.csv" for name in (*TABLES, "comparisons", "choice"))
    files = (".lock", "study.json", *tables, "tables.md", "report.html")
    output = prepare_output(output, ("units", "stages"), files)
    with locked(output):
        store, works = UnitStore(output), _works(study, arms)
        pending = [w for w in works if store.read(w.unit, study.fingerprint(w.unit.regime, w.arm)) is None]
        facts = {"study": study.to_dict(), "machine": machine_facts()}
        write_atomically(output / "study.json", json.dumps(facts, indent=1) + "\n")
        _run(study, output, store, pending, len(works), progress)
        if not arms:  # others may be asked for next, which share stages
            shutil.rmtree(output / "stages", ignore_errors=True)
        rows = []
        for work in works:
            found = store.read(work.unit, study.fingerprint(work.unit.regime, work.arm))
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


def _works(study: BackboneStudy, arms: tuple[str, ...]) -> list[_Work]:
    return [
        _Work(BlockUnit(regime, study.run_name(arm, variation), block[0], len(block)), arm, variation, block)
        for regime in study.regimes
        for block in study.blocks
        for arm in study.arms_of(regime)
        if (not arms or arm in arms) and block[0] - study.first_seed < (study.arms[arm].most_seeds or study.seeds)
        for variation in study.variations(regime, arm)
    ]


def _run(
    study: BackboneStudy, output: Path, store: UnitStore, pending: list[_Work], total: int, progress: bool
) -> None:
    bars = Progress(
        TextColumn("{task.description:<60}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not progress,
        refresh_per_second=2,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with bars:
            current = bars.add_task("starting", total=1, note="")
            overall = bars.add_task(f"{study.name}: units", total=total, completed=total - len(pending), note="")
            start, last = time.monotonic(), 0.0
            made: tuple[str, tuple[int, ...]] | None = None
            for done, work in enumerate(pending):
                seeds = f"seeds {work.block[0]} to {work.block[-1]}"
                where = f"{work.unit.regime}, {seeds}: {work.unit.arm}"

                def on_step(stage: str, step: int, steps: int, where: str = where) -> None:
                    nonlocal last
                    if time.monotonic() - last > 0.3 or step == steps:
                        last = time.monotonic()
                        bars.update(current, description=f"{where}: {stage}", completed=step, total=steps)

                if made != (work.unit.regime, work.block):
                    made = (work.unit.regime, work.block)
                    folder = output / "stages" / f"{work.unit.regime}-{work.block[0]}-{len(work.block)}"
                    block = make_block(study, work.unit.regime, work.block, folder, on_step)
                    makers = BackboneArms(study, work.unit.regime, block, folder)
                makers.on_step = on_step
                began = time.perf_counter()
                rows = unit_rows(study, work.unit, makers, work.arm, work.variation)
                seconds = (time.perf_counter() - began) / len(rows)
                for row in rows:
                    row["timings"] = {"seconds": seconds}
                store.write(work.unit, study.fingerprint(work.unit.regime, work.arm), {"rows": rows})
                left = (time.monotonic() - start) / (done + 1) * (len(pending) - done - 1)
                bars.update(overall, advance=1, note=f"about {minutes(left)} left")
    finally:
        torch.set_num_threads(threads)


def unit_rows(
    study: BackboneStudy, unit: BlockUnit, makers: BackboneArms, arm: str, variation: Variation
) -> list[dict]:
    """Trains and measures one arm over one block: for each seed what `store.write_tables` takes."""
    models = makers.make(arm, variation)
    found = measure(makers.block, makers.scores(models), study.measure.fixed_kl)
    training, serving = models.training_flops.tolist(), models.serving_flops.tolist()
    return [
        {
            "regime": unit.regime,
            "seed": seed,
            "arm": unit.arm,
            "optimiser": "best_of_n",
            "values": {
                **one["values"],
                "parameters": models.served,
                "training_flops": training[i],
                "serving_flops": serving[i],
            },
            "curve": one["curve"],
            "experts": [],
        }
        for i, (seed, one) in enumerate(zip(makers.block.seeds, found, strict=True))
    ]
