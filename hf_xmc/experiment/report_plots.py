"""The plots of a report, each with a description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from hf_xmc.experiment.plots import BLUE, data_uri, legend, panels, style

SHOWN = ("P@1", "P@5", "R@100")  # validation metrics during training


class Plot(NamedTuple):
    """An image in a page."""

    uri: str  # contains the image
    alt: str
    caption: str


def training_plots(history: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Return the plots of the loss and of the validation metrics, without curves of fewer than two points."""
    loss = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
    curves = {
        name: [(entry["epoch"], 100 * entry[f"eval_{name}"]) for entry in history if f"eval_{name}" in entry]
        for name in SHOWN
    }
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    plots = []
    if len(loss) > 1:
        alt = f"The training loss goes from {loss[0][1]:.3g} to {loss[-1][1]:.3g} in {loss[-1][0]:.3g} epochs."
        plots.append(_curves("Training loss", {"loss": loss}, alt, "The loss should fall, and level off at the end."))
    if curves:
        ends = ", ".join(f"{name} from {points[0][1]:.1f} to {points[-1][1]:.1f}" for name, points in curves.items())
        caption = "Metrics on texts held out from training. They should rise, and level off at the end."
        plots.append(_curves("On validation texts, %", curves, f"In training, {ends} percent.", caption))
    return plots


def _curves(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], alt: str, caption: str) -> Plot:
    with style():
        figure, axes = panels()
        for name, points in curves.items():
            axes[0, 0].plot(*zip(*points, strict=True), marker="o" if len(points) <= 20 else None, label=name)
        axes[0, 0].set(title=title, xlabel="epoch (all training texts, once)")
        whole = all(epoch == round(epoch) for points in curves.values() for epoch, _ in points)
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
        if len(curves) > 1:
            legend(figure)
        return Plot(data_uri(figure), alt, caption)


def frequency_plots(deciles: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Return the plot of R@100 by label frequency, or nothing for fewer than ten labels."""
    if not deciles:
        return []
    groups = merged(deciles)
    names = [group["name"] for group in groups]
    recall = [100 * group["recall"] for group in groups]
    with style():
        figure, axes = panels()
        bars = axes[0, 0].barh(names, recall, color=BLUE)
        axes[0, 0].bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
        axes[0, 0].set(title="Correct labels found, %", ylabel="training texts of a label", xlim=(0, 112))
        axes[0, 0].grid(axis="y", visible=False)
        axes[0, 0].invert_yaxis()
        caption = (
            "Share of the correct labels that are among the first 100 predictions, by the number of training texts of "
            "a label. Each bar is a tenth of the labels, or several tenths if they have the same number."
        )
        alt = (
            f"Correct labels found: {recall[0]:.0f} percent of those with {names[0]} training texts, "
            f"{recall[-1]:.0f} percent of those with {names[-1]}."
        )
        return [Plot(data_uri(figure), alt, caption)]


def merged(deciles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return groups of labels with their name and recall; neighbors with the same name become one group.

    >>> ones = {"min_count": 1, "max_count": 1}
    >>> merged([{**ones, "recall": 0.2, "num_positives": 10}, {**ones, "recall": 0.5, "num_positives": 20}])
    [{'name': '1', 'recall': 0.4, 'num_positives': 30}]
    """
    groups: list[dict[str, Any]] = []
    for decile in deciles:
        low, high, size = decile["min_count"], decile["max_count"], decile["num_positives"]
        name = f"{low:,}" if low == high else f"{low:,}–{high:,}"
        if not groups or groups[-1]["name"] != name:
            groups.append({"name": name, "recall": 0.0, "num_positives": 0})
        group = groups[-1]
        total = group["num_positives"] + size
        group["recall"] = (group["recall"] * group["num_positives"] + decile["recall"] * size) / max(1, total)
        group["num_positives"] = total
    return groups
