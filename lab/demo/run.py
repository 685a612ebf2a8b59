"""Runs a recipe from data to report: the product's main job, end to end.

Which stages it has follows from the recipe's assignment (`by_token.py`, `by_sequence.py`); what is drawn and written is
`report.py`'s and `plots.py`'s business.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..files import prepare_output
from ..workers import quiet_transformers
from .by_sequence import BySequence
from .by_token import ByToken
from .config import RecipeConfig
from .plots import plots_of
from .stages import REPORT_FILES, RecipeResult


def run_recipe(config: RecipeConfig, output: str | Path, progress: bool = True) -> RecipeResult:
    """Runs the main job and exports the mixture, the merged and the distilled model to `output`.

    Args:
        config: the recipe.
        output: folder for the models, `moe/`, `merged/` and, by sequence, `distilled/`; made if missing.
        progress: show progress bars.

    Returns:
        Everything found, the outcome of each check included: a check that failed does not raise here.

    Raises:
        ValueError: the folder cannot be used.
        ReloadError: stock transformers could not load the exported model without ummrm.
    """
    way = BySequence if config.upcycle.by_sequence else ByToken
    output = prepare_output(output, way.FOLDERS, [*REPORT_FILES, *(f"{name}.png" for name in plots_of(config))])
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    bars = Progress(
        TextColumn("{task.description:<20}"),  # short, so that 80 columns leave room for all
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not progress,
    )
    with quiet_transformers():
        try:
            with bars:
                return way(config, output, bars).run()
        finally:
            torch.set_num_threads(threads)
