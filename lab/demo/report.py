"""What a run leaves behind: a table to read, results.json and CSV files to work with, and the plots."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import platform
from pathlib import Path

import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .measure import Accuracy
from .plots import write_plots
from .stages import DENSE, REPORT_FILES, ArmResult, RecipeCheckError, RecipeResult

_COUNTS = ("no", "one", "two", "three", "four", "five", "six")


def result_table(result: RecipeResult) -> Table:
    """The table of the reward models, a column each, for a rich console of 80 columns or more."""
    title = f"{result.config.name}: {_COUNTS[len(result.arms)]} reward models"
    table = Table(title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for name in result.arms:
        table.add_column(result.labels[name].replace(" ", "\n"), justify="right", vertical="bottom", no_wrap=True)
    arms, base = list(result.arms.values()), result.arms[DENSE].latency
    rows = {
        "accuracy": [_accuracy(a.test) for a in arms],
        "  shortcut reversed": [_accuracy(a.shifted) for a in arms],
        "parameters": [f"{a.parameters:,}" for a in arms],
        "forward, ms": [f"{a.latency.milliseconds:.2f}" for a in arms],
        "  times dense": [f"{a.latency.milliseconds / base.milliseconds:.2f}" for a in arms],
        "  noise of that": [f"{a.latency.noise + base.noise:.1%}" for a in arms],
        f"gold, best of {_last_n(result)}": [
            f"{a.best_of_n.gold[-1]:.2f}±{a.best_of_n.gold_error[-1]:.2f}" for a in arms
        ],
        "gold at peak (n)": [_peak(a) for a in arms],
    }
    for measure, values in rows.items():
        table.add_row(measure, *values)
    return table


def _accuracy(found: Accuracy) -> str:
    """`.784±.009`, so that five fit beside each other."""
    return "±".join(f"{value:.3f}".removeprefix("0") for value in (found.value, found.standard_error))


def _peak(arm: ArmResult) -> str:
    gold, n = max(zip(arm.best_of_n.gold, arm.best_of_n.n, strict=True))
    return f"{gold:.2f} ({n})"


def summary_lines(result: RecipeResult) -> list[str]:
    """What the table does not say: what its errors mean, the merge weights, the experts, the checks."""
    pairs, prompts = len(result.task.test), result.task.policy.gold.shape[0]
    batch = min(result.config.evaluation.latency_batch, pairs)
    lines = [
        f"± is the standard error over {pairs} pairs or {prompts} prompts of this one seed; "
        "it says nothing about other seeds.",
        f"Accuracy is against the gold reward, without label noise. Latency: batch of {batch}, best of "
        f"{result.config.evaluation.latency_rounds} interleaved rounds, {_threads(result)} thread(s).",
    ]
    if result.alpha_loss is not None:
        uniform, learned = result.alpha_loss
        lines.append(
            f"Training loss of the merged model: {uniform:.6f} with uniform merge weights, {learned:.6f} with learned."
        )
    if result.specialisation is not None:
        weight, output = result.specialisation.mean()
        lines.append(
            f"Routed experts differ from each other by {weight:.1%} of their norm in weights, by {output:.1%} in "
            "outputs."
        )
    if result.members is not None:
        alone = ", ".join(_accuracy(one) for one in result.members.test)
        lines.append(
            f"Members one by one: accuracy {alone}; two of them order {result.members.disagreement:.1%} of the "
            "held-out pairs differently."
        )
    if result.gap is not None:
        merged, distilled = result.gap
        lines.append(
            f"Distance to the members' mean on held-out answers, in its standard deviations: {merged:.3f} merged, "
            f"{distilled:.3f} distilled."
        )
    if result.reload is not None:
        lines.append(
            f"Reloaded as {result.reload.model_class} where ummrm cannot be imported: {result.reload.scores} scores, "
            f"largest difference {result.reload.difference:g}."
        )
    lines += [f"{'passed' if check.passed else 'FAILED'}  {check}" for check in result.checks]
    return lines


def write_report(result: RecipeResult, output: str | Path, console: Console | None = None) -> list[Path]:
    """Writes everything into `output` and prints the table.

    Args:
        result: of a run.
        output: folder; made if missing.
        console: where the table is printed; None prints nothing.

    Returns:
        The files: results.json, results.csv, best_of_n.csv, training.csv, table.txt and the plots.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(result_dict(result), indent=1) + "\n")
    _write_csv(output / "results.csv", _arm_rows(result))
    _write_csv(output / "best_of_n.csv", _best_of_n_rows(result))
    _write_csv(output / "training.csv", _training_rows(result))
    with open(output / "table.txt", "w") as file:
        _show(result, Console(file=file, width=132))
    files = [output / name for name in REPORT_FILES]
    files += write_plots(result, output)
    if console is not None:
        _show(result, console)
    return files


def raise_for_failed_checks(result: RecipeResult, output: str | Path) -> None:
    """Raises RecipeCheckError if something did not come out as it must; names each check, its value and its range."""
    failed = [check for check in result.checks if not check.passed]
    if failed:
        raise RecipeCheckError(failed, Path(output))


def result_dict(result: RecipeResult) -> dict:
    """Everything found, as JSON-ready data; numbers that are not finite become null."""
    data = {
        "recipe": result.config.to_dict(),
        "machine": {
            "processor": _processor(),
            "threads": _threads(result),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "task": result.task.facts,
        "arms": {name: arm.to_dict() for name, arm in result.arms.items()},
        **(_by_sequence(result) if result.config.upcycle.by_sequence else _by_token(result)),
        **(_learned(result) if result.alpha_loss is not None else {}),
        "reload": vars(result.reload) if result.reload is not None else None,
        "checks": [vars(check) for check in result.checks],
        "seconds": result.seconds,
    }
    return _finite(data)


def _by_token(result: RecipeResult) -> dict:
    assert result.specialisation is not None
    return {
        "routed_share": result.routed_share,
        "shared_weight": result.shared_weight,
        "expert_weight_distance": result.specialisation.weight_distance,
        "expert_disagreement": result.specialisation.disagreement,
    }


def _by_sequence(result: RecipeResult) -> dict:
    assert result.members is not None and result.gap is not None
    return {
        "members": dataclasses.asdict(result.members),
        "distance_to_the_mean": dict(zip(("merged", "distilled"), result.gap, strict=True)),
    }


def _learned(result: RecipeResult) -> dict:
    assert result.alpha_loss is not None
    return {
        "merged_uniform_accuracy": result.uniform_accuracy,
        "alpha_loss": dict(zip(("uniform", "learned"), result.alpha_loss, strict=True)),
        "merge_coefficients": result.coefficients,
    }


def _show(result: RecipeResult, console: Console) -> None:
    console.print(result_table(result))
    for line in summary_lines(result):
        style = "bold red" if line.startswith("FAILED") else None
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def _threads(result: RecipeResult) -> int:
    return result.config.threads or torch.get_num_threads()


def _last_n(result: RecipeResult) -> int:
    return next(iter(result.arms.values())).best_of_n.n[-1]


def _arm_rows(result: RecipeResult) -> list[dict]:
    return [{"arm": name, "label": result.labels[name], **_arm_row(arm)} for name, arm in result.arms.items()]


def _arm_row(arm: ArmResult) -> dict:
    return {
        "accuracy": arm.test.value,
        "accuracy_standard_error": arm.test.standard_error,
        "accuracy_shortcut_reversed": arm.shifted.value,
        "accuracy_shortcut_reversed_standard_error": arm.shifted.standard_error,
        "parameters": arm.parameters,
        "forward_ms": arm.latency.milliseconds,
        "forward_noise": arm.latency.noise if math.isfinite(arm.latency.noise) else None,
        "gold_at_largest_n": arm.best_of_n.gold[-1],
        "gold_at_largest_n_standard_error": arm.best_of_n.gold_error[-1],
    }


def _best_of_n_rows(result: RecipeResult) -> list[dict]:
    rows = []
    for name, arm in result.arms.items():
        columns = vars(arm.best_of_n)
        for values in zip(*columns.values(), strict=True):
            rows.append({"arm": name, **dict(zip(columns, values, strict=True))})
    return rows


def _training_rows(result: RecipeResult) -> list[dict]:
    rows = []
    for stage, history in result.histories.items():
        evaluated = {step: i for i, step in enumerate(history.evaluated)}
        for step, (loss, extra) in enumerate(zip(history.loss, history.auxiliary, strict=True), start=1):
            accuracies = {
                f"{name}_accuracy": values[evaluated[step]] if step in evaluated else ""
                for name, values in history.accuracy.items()
            }
            rows.append({"stage": stage, "step": step, "loss": loss, "auxiliary_loss": extra, **accuracies})
    return rows


def _write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
