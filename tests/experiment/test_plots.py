"""The style of all plots can be read, and leaves no trace of a run."""

import ast
from pathlib import Path

import matplotlib
import numpy as np

from hf_xmc.experiment.plots import COLORS, data_uri, legend, panels, style

ROOT = Path(__file__).parents[2]


def test_colors_can_be_read_on_white():
    for color in COLORS:
        channels = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5  # WCAG 2, level AA


def test_the_same_plot_is_the_same_file_and_the_style_ends_with_its_context():
    before, images = dict(matplotlib.rcParams), []
    for _ in range(2):
        with style():
            figure, axes = panels(2, 3)
            axes[1, 2].plot([1, 2], [3, 4], label="P@1")
            images.append(data_uri(figure))
    assert axes.shape == (2, 3)
    assert images[0] == images[1]
    assert axes[1, 2].lines[0].get_color() == COLORS[0]
    assert dict(matplotlib.rcParams) == before


def test_the_legend_is_below_the_panels_and_names_each_curve_once():
    with style():
        figure, axes = panels(2)
        for number in range(4):
            axes[number % 2, 0].plot([1, 2], [number, 4], label=f"loss {number // 2 * 2}", color=COLORS[number // 2])
        axes[1, 0].plot([1, 2], [2, 2], label="only below", color=COLORS[2])
        legend(figure, 2)
        figure.draw_without_rendering()
    (box,) = figure.legends
    assert [text.get_text() for text in box.get_texts()] == ["loss 0", "loss 2", "only below"]
    assert [handle.get_color() for handle in box.legend_handles] == list(COLORS[:3])
    assert box.get_window_extent().y1 < min(axis.get_tightbbox().y0 for axis in figure.axes)
    with style():
        figure, _ = panels()
        legend(figure)
    assert figure.legends == []  # no curve has a label


def test_files_are_saved_at_the_resolution_of_the_style(tmp_path):
    with style():
        figure, _ = panels(2)
        figure.savefig(tmp_path / "plot.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "plot.png").shape
    assert (width, height) == (506, 682)


def test_every_plot_is_drawn_in_the_common_style():
    modules = [path for folder in ("hf_xmc", "recipes", "docs") for path in sorted((ROOT / folder).rglob("*.py"))]
    draw, use_matplotlib, wrong = set(), set(), []
    for path in modules:
        code, taken = path.read_text(encoding="utf-8"), {}
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                taken |= {alias.name: set() for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                taken.setdefault(node.module, set()).update(alias.name for alias in node.names)
        if any(name.startswith("matplotlib") and name != "matplotlib.ticker" for name in taken):
            use_matplotlib.add(path.name)
        if ".savefig(" in code or "data_uri(" in code:
            draw.add(path.name)
            if not {"panels", "style"} <= taken.get("hf_xmc.experiment.plots", set()) or "dpi=" in code:
                wrong.append(path.name)
    assert use_matplotlib == {"plots.py"}
    assert draw == {"compare.py", "figures.py", "loss.py", "modes.py", "scale.py", "step.py", "synthetic.py"} | {
        "plots.py",
        "report_plots.py",
    }
    assert wrong == ["plots.py"]  # the style itself
