"""How the laboratory's figures look: fonts, lines, and a legend below the axes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FONT = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """One legend for the figure, of the entries of `axis`."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2)
