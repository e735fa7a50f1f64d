"""Draw docs/images/gradients.svg: the gradient of the softmax and of the decoupled softmax at each label of one query.

python docs/figures.py
"""

from pathlib import Path

import torch

from hf_xmc import decoupled_softmax_loss, softmax_loss
from hf_xmc.experiment.plots import BLUE, GREY, ORANGE, panels, style

SCORES = torch.tensor([[4.0, 0.0, 1.0, 0.0, -1.0, -1.0]])
POSITIVES = torch.tensor([[0, 1]])
NAMES = ["easy\npositive", "other\npositive", "n1", "n2", "n3", "n4"]

with style():
    figure, axes = panels(1, 2, (5.0, 3.0), sharey=True)
    for axis, loss, title in zip(
        axes[0], (softmax_loss, decoupled_softmax_loss), ("Softmax", "Decoupled softmax"), strict=True
    ):
        scores = SCORES.clone().requires_grad_()
        loss(scores, POSITIVES).backward()
        push = (-scores.grad[0]).tolist()
        axis.bar(NAMES, push, color=[ORANGE if push[0] < 0 else BLUE, BLUE, *[GREY] * 4])
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set_title(title)
        axis.annotate(f"{push[0]:+.2f}", (0, push[0]), (0, push[0] + (0.03 if push[0] > 0 else -0.06)), ha="center")
        axis.annotate(f"{push[1]:+.2f}", (1, push[1]), (1, push[1] + 0.03), ha="center")
        axis.set_ylim(-0.52, 0.58)
    axes[0][0].set_ylabel("push on the score")
    figure.savefig(Path(__file__).parent / "images" / "gradients.svg", metadata={"Date": None})
