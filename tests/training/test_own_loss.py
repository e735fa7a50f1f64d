"""Users can write a loss of their own: the example in CONTRIBUTING.md trains."""

import re

import torch
from helpers.tiny import LABELS, ROOT, make_static_encoder
from helpers.training import tiny_arguments

from hf_xmc import XMCTrainer


def test_the_loss_in_contributing_trains(queries, tmp_path):
    (code,) = re.findall(r"```python\n(class MarginLoss.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names = {"torch": torch}
    exec(code, names)
    loss = names["MarginLoss"]()
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    value = loss(torch.tensor([[1.0, 0.0]]), embeddings, torch.tensor([[0, -100]]))
    assert value == 3  # the margin of label 0, with score 1, to label 2, with score 3
    encoder = make_static_encoder()
    trainer = XMCTrainer(encoder, tiny_arguments(tmp_path, num_train_epochs=20), queries, labels=LABELS, loss=loss)
    trainer.train()
    history = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    batch = next(iter(trainer.get_train_dataloader()))
    assert float(trainer.compute_loss(encoder, batch)) < history[0]
