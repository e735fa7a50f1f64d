"""The visual style of all plots: colors that are distinct without color vision, and light axes.

All plots, also those of the recipes and of the documentation, are drawn by :func:`panels` in :func:`style`.
"""

from __future__ import annotations

from base64 import b64encode
from contextlib import AbstractContextManager
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#1f5fbf", "#b65200", "#11784a", "#7a3e9d", "#b3261e", "#5c6470"
PALE_BLUE = "#9dbfee"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)  # each has a contrast of at least 4.5 to white
PANEL = (4.6, 3.1)  # inches; readable at the width of a phone
STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 10.5,
    "grid.alpha": 0.25,
    "legend.fontsize": "small",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "savefig.dpi": 110,  # a panel has 506 pixels
    "svg.hashsalt": "hf_xmc",  # equal plots give equal files
}


def style() -> AbstractContextManager[None]:
    """Return a context manager for drawing and saving figures in this style."""
    return matplotlib.rc_context(STYLE)


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = PANEL, **settings: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes ``(rows, columns)``.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        size: Width and height of a panel, in inches.
        settings: Other arguments of ``Figure.subplots``.
    """
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def legend(figure: Figure, columns: int = 3) -> None:
    """Add a legend below the panels, where it covers no curve. Each label occurs once, even if several curves have it.

    Args:
        figure: A figure of :func:`panels`.
        columns: Maximum number of labels in a row.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        ncols = min(columns, len(handles))
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=ncols)


def data_uri(figure: Figure) -> str:
    """Return a figure as a data URI of an SVG image."""
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + b64encode(file.getvalue()).decode()
