"""The page of a study's report: its tables, lines and plots put into `report.html.j2`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from .tables import Table

_CAPTIONS = {
    "best_of_n": "Where gold falls while the proxy rises, the reward model is being exploited. Bands: 95% over seeds.",
    "ppo": "The same under PPO, every policy starting from the same one. Paths end where their KL penalty holds them.",
    "rloo": "The same under TRL's RLOO. KL is measured apart from TRL's own estimate, and exact at the visited states.",
    "grpo": "The same under TRL's GRPO. KL is measured apart from TRL's own estimate, and exact at the visited states.",
    "differences": "Right of the line the first arm has more of it. Bars: 95% t intervals over seeds.",
    "accuracy": "Tail: pairs of the policy's own answers of which one has more of the shortcut than training showed.",
    "shared_share": "Merged models by λ, with learned merge weights.",
    "gates": "Expert indices mean nothing across seeds, so that experts are ranked within each.",
    "specialisation": "Above: what a token's first expert tells of the instruction regime of its pair; chance is the "
    "same with regimes dealt out to sequences at random. Below: experts are left out of all layers at once.",
}


def page(
    study: Any, machine: dict, plots: Sequence[Path], **parts: Table | list[Table] | list[str] | str | None
) -> str:
    """The page as HTML.

    Args:
        study: with name, regimes, arms and device.
        machine: what it ran on.
        plots: files, in order.
        parts: the rest of what the template shows: `seeds`, `drawn`, `start`, `primary`, `arms`, `paths`,
            `comparisons`.
    """
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    ).get_template("report.html.j2")
    return template.render(study=study, machine=machine, figures=[_figure(path) for path in plots], **parts)


def seeds_in_words(seeds: Sequence[int]) -> str:
    """How many seeds, from which to which."""
    return f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})" if seeds else "no seeds"


def _figure(path: Path) -> dict[str, str]:
    """A plot as the page holds it: its name, its bytes in base64, its caption."""
    data = base64.b64encode(path.read_bytes()).decode()
    return {"name": path.stem, "data": data, "caption": _CAPTIONS.get(path.stem.partition("-")[0], "")}
