"""`ummrm inspect`: what has become of a mixture's experts, printed, as JSON, and plotted."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .errors import UserError, blaming
from .screen import note, quiet_libraries, say
from .source import admit_code, open_source

if TYPE_CHECKING:
    from ..hf.inspection import ExpertReport, MixtureReport


def inspect(
    moe: Annotated[str, typer.Argument(help="Folder or hub name of an upcycled model, in its mixture or merge phase.")],
    texts: Annotated[
        Path | None,
        typer.Option(help="JSONL of texts or pairs: then the load of experts, or the agreement of members, is shown."),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many rows of --texts are read.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Texts in one forward pass.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw it in.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")] = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Shows how far a mixture's experts are apart, how they are used, and how they merge.

    Distances are between two experts' weights, in norms of their mean: 0 as
    upcycled. By token, --texts shows the largest and the smallest share of the
    slots that an expert gets (1/E when balanced).

    Example: ummrm inspect trained-rm --texts pairs.jsonl --plot experts.png
    """
    options.check_device(device)
    if plot is not None and plot.suffix != ".png":
        raise UserError(f"--plot must be a PNG file, got {plot}.")
    with quiet_libraries():
        source = open_source(moe)
        admit_code(source, trust_remote_code)
        if not source.is_upcycled:
            raise UserError(f"{moe} is a dense model and has no experts; run `ummrm upcycle` on it first.")
        from ..hf.inspection import inspect_mixture
        from ..hf.loading import load_checkpoint

        rows = None if texts is None else _read(texts, limit)
        with blaming(f"{moe} can't be loaded", OSError, ValueError):
            model: Any = load_checkpoint(source.folder, trust_remote_code=trust_remote_code)
            model.to(device)
        with blaming("--texts can't be scored", ValueError):
            ids = None if rows is None else _tokens(rows, source.folder, texts, trust_remote_code)
            report = inspect_mixture(model, ids, batch_size=batch_size)
        if plot is not None:
            _draw(report, plot)
    if as_json:
        print(json.dumps(_plain(report), indent=1))
        return
    _print(report)


def _read(path: Path, limit: int) -> list[dict]:
    if not path.is_file():
        raise UserError(f"--texts must be a JSONL file, and {path} is {'none' if path.exists() else 'not there'}.")
    rows: list[dict] = []
    with blaming("--texts can't be read", OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(rows) == limit:
                break
            if line.strip():
                with blaming(f"{path}:{number} is no JSON", ValueError):
                    rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise UserError(f"{path}:{number} must hold an object, got a {type(rows[-1]).__name__}.")
    if not rows:
        raise UserError(f"--texts must hold rows, and {path} is empty.")
    return rows


def _tokens(rows: list[dict], folder: Path, path: Path | None, trust: bool) -> list[array]:
    from transformers import AutoTokenizer

    from ..hf.texts import texts_of, token_ids

    with blaming(f"{folder} must have a tokenizer for --texts", Exception):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    ids = []
    for number, row in enumerate(rows, 1):
        with blaming(f"{path}, row {number}", ValueError):
            ids += [array("i", token_ids(tokenizer, text, row)) for text in texts_of(row)]
    return ids


def _print(report: MixtureReport) -> None:
    first = report.experts[0]
    head = ["module", "distance", "closest"]
    head += ["slots", "shared weight"] if first.slot_share is not None else []
    head += ["merge weights"] if first.coefficients is not None else []
    rows: list[list[str]] = [head]
    for one in report.experts:
        pair = "" if one.closest is None else f"{one.closest[0]}, {one.closest[1]}"
        row = [one.name, f"{one.spread:.4f}", pair]
        if one.slot_share is not None:
            row += [_range(one.slot_share.tolist()), f"{one.shared_weight:.3f}"]
        if one.coefficients is not None:
            row.append(_range(_routed(one).flatten().tolist()))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if report.shared_share is not None:
        say(f"lambda, the shared experts' share: {report.shared_share:.3f}")
    if report.agreement is not None:
        others = [value for i, row in enumerate(report.agreement.tolist()) for value in row[:i]]
        say(f"correlation of members' scores: {_range(others)}" if others else "one member")
    if first.slot_share is None and report.agreement is None and first.coefficients is None:
        note("note: with --texts the load of experts, or the agreement of members, is shown too")


def _routed(one: ExpertReport) -> Any:
    assert one.coefficients is not None
    return one.coefficients[:, -len(one.distances) :]


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def _plain(report: MixtureReport) -> dict[str, Any]:
    def numbers(value: Any) -> Any:
        return value if value is None or isinstance(value, float) else value.tolist()

    names = ("distances", "coefficients", "slot_share", "shared_weight")
    modules = [
        {"name": one.name, "distance": one.spread, **{name: numbers(getattr(one, name)) for name in names}}
        for one in report.experts
    ]
    return {
        "modules": modules,
        "agreement": numbers(report.agreement),
        "shared_share": report.shared_share,
    }


def _draw(report: MixtureReport, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}); pip install 'ummrm[run]'.") from error
    panels: list[tuple[str, list[list[float]]]] = []
    if report.experts[0].slot_share is not None:
        panels.append(
            ("share of slots", [one.slot_share.tolist() for one in report.experts if one.slot_share is not None])
        )
    if report.experts[0].coefficients is not None:
        panels.append(("merge weights", [_routed(one).mean(0).tolist() for one in report.experts]))
    if report.agreement is not None:
        panels.append(("correlation of members", report.agreement.tolist()))
    figure = Figure(figsize=(4.5 * (1 + len(panels)), max(3.0, 0.18 * len(report.experts) + 1.5)), layout="constrained")
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    names = [one.name for one in report.experts]
    axes[0].barh(range(len(names)), [one.spread for one in report.experts], color="#4477aa")
    axes[0].set_yticks(range(len(names)), names, fontsize=6)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("distance of two experts, in norms of their mean")
    for axis, (title, values) in zip(axes[1:], panels, strict=True):
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        axis.set_title(title)
        axis.set_xlabel("expert")
        axis.set_xticks(range(len(values[0])))
        figure.colorbar(image, ax=axis)
    with blaming(f"{path} can't be written", OSError):
        figure.savefig(path, dpi=120)
    note(f"drawn in {path}")
