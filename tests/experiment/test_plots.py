"""The style of all plots can be read, and leaves no trace of a run."""

import matplotlib
import numpy as np

from hf_xmc.experiment.plots import COLORS, data_uri, panels, style


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
