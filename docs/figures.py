"""Draw the plots of the documentation, from the tables of its pages and the curves in `images/curves.json`.

    python docs/figures.py

The functions that draw are those of the recipes. `curves.json` has the curves of `recipes/synthetic.py easy`. Those of
`limits` are not stored, so `synthetic-limits.png` is drawn by the recipe alone.
"""

import json
import sys
from pathlib import Path

import torch

from hf_xmc import decoupled_softmax_loss, softmax_loss
from hf_xmc.experiment.plots import BLUE, GREY, ORANGE, panels, style

DOCS = Path(__file__).parent
RECIPES = DOCS.parent / "recipes"
SCORES = torch.tensor([[4.0, 0.0, 1.0, 0.0, -1.0, -1.0]])
POSITIVES = torch.tensor([[0, 1]])
NAMES = ["easy\npositive", "other\npositive", "n1", "n2", "n3", "n4"]


def main(folder: Path) -> None:
    sys.path[:0] = [str(RECIPES), str(RECIPES / "benchmarks")]
    draw_gradients(folder / "gradients.svg")
    draw_losses(folder / "compare.png")
    draw_modes(folder / "modes.png")
    draw_cost(folder / "loss.png")
    draw_synthetic(folder)


def table(page: str, start: str) -> list[list[str]]:
    """Return the cells of the first table of a page that starts with ``start``. An empty cell repeats the one above."""
    lines = (DOCS / "results" / page).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(start))
    rows: list[list[str]] = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
        rows.append([cell or rows[-1][column] for column, cell in enumerate(cells)] if rows else cells)
    return rows


def mean(cell: str) -> float:
    """Return the number of a cell such as `73.76 ± 0.28`, `0.38x` or `4,096`."""
    return float(cell.split(" ± ", maxsplit=1)[0].rstrip("x").replace(",", ""))


def draw_gradients(path: Path) -> None:
    """Draw the gradient of the softmax and of the decoupled softmax at each label of one query."""
    with style():
        figure, axes = panels(2, size=(4.6, 2.6), sharey=True)
        for axis, loss, title in zip(
            axes[:, 0], (softmax_loss, decoupled_softmax_loss), ("Softmax", "Decoupled softmax"), strict=True
        ):
            scores = SCORES.clone().requires_grad_()
            loss(scores, POSITIVES).backward()
            push = (-scores.grad[0]).tolist()
            axis.bar(NAMES, push, color=[ORANGE if push[0] < 0 else BLUE, BLUE, *[GREY] * 4])
            axis.axhline(0, color=GREY, linewidth=0.8)
            for place in (0, 1):
                above = 0.03 if push[place] > 0 else -0.09
                axis.text(place, push[place] + above, f"{push[place]:+.2f}", ha="center")
            axis.set(title=title, ylabel="push on the score", ylim=(-0.55, 0.6))
        figure.savefig(path, metadata={"Date": None})


def draw_losses(path: Path) -> None:
    """Draw R@100 by label frequency, and P@1 by the number of negatives."""
    import compare

    recall = {loss: [mean(cell) for cell in cells] for loss, *cells in table("losses.md", "| loss | 1 | 2 |")}
    everything = {row[0]: row[3] for row in table("losses.md", "| | learning rate | seeds | P@1")}
    negatives = [row for row in table("losses.md", "| negatives | decoupled P@1") if row[0].endswith(" random")]
    cells = {
        "decoupled softmax": [(name.removesuffix(" random"), cell) for name, cell, *_ in negatives],
        "softmax": [(name.removesuffix(" random"), row[3]) for name, *row in negatives],
    }
    precision = {
        loss: [(name, *map(float, cell.split(" ± "))) for name, cell in [*points, ("all", everything[loss])]]
        for loss, points in cells.items()
    }
    compare.draw(recall, precision, path)


def draw_modes(path: Path) -> None:
    """Draw P@1 of the label modes by steps, and by time in steps of `exact`."""
    import modes

    curves: dict[str, list[tuple[float, float, float]]] = {"exact": [], "fresh": []}
    for row in table("label-modes.md", "| flags | seeds | steps | `exact`")[:4]:
        steps, exact, fresh, time = mean(row[2]), mean(row[3]), mean(row[4]), mean(row[8])
        curves["exact"].append((steps, steps, exact))
        curves["fresh"].append((steps, steps * time, fresh))
    for mode, *differences, _, time_ in table("label-modes.md", "| mode, less `exact`"):
        curves[mode] = [
            (steps, steps * mean(time_), exact + mean(difference))
            for (steps, _, exact), difference in zip(curves["exact"], differences, strict=True)
        ]
    modes.draw(curves, path)


def draw_cost(path: Path) -> None:
    """Draw the time and the memory of the streamed losses."""
    import loss

    variants = {
        "streamed": "streamed, 256 MiB",
        "streamed, `gradient_dtype=torch.bfloat16": "streamed, 256 MiB, bf16",
    }
    rows = [
        {
            "loss": "decoupled",
            "labels": mean(row[0]),
            "variant": variants.get(row[1], row[1]),
            "times_floor": mean(row[3]),
            "extra_mib": mean(row[5]),
        }
        for row in table("loss-cost.md", "| labels | variant")
    ]
    loss.plot(rows, path)


def draw_synthetic(folder: Path) -> None:
    """Draw the curves of the experiment with one easy positive."""
    import synthetic

    for name, curves in json.loads((DOCS / "images" / "curves.json").read_text()).items():
        synthetic.plot(curves, folder / f"{name}.png")


if __name__ == "__main__":
    main(DOCS / "images")
