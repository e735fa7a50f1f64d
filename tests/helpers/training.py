"""Trainings of seconds: their arguments, and trainers that remember their batches."""

import copy

from sentence_transformers import SentenceTransformerTrainer

from hf_xmc import XMCTrainer, XMCTrainingArguments

TINY = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 5,
    "learning_rate": 0.05,
    "num_train_epochs": 3,
}
# One step of plain gradient descent: the weights move by the gradient.
ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def tiny_arguments(folder, **settings):
    """Return arguments of a training on the CPU that saves and reports nothing, unless settings say so."""
    return XMCTrainingArguments(str(folder), **{**TINY, **settings})


class RecordsInputs:
    """A mixin for trainers that keeps a copy of every batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inputs = []

    def compute_loss(self, model, inputs, *rest, **kwargs):
        self.inputs.append(copy.deepcopy(inputs))
        return super().compute_loss(model, inputs, *rest, **kwargs)

    @property
    def batches(self):
        """The features and the labels of every batch."""
        return [self.collect_features(copy.deepcopy(inputs)) for inputs in self.inputs]


class Recording(RecordsInputs, XMCTrainer):
    """An ``XMCTrainer`` that keeps its batches."""


class StockRecording(RecordsInputs, SentenceTransformerTrainer):
    """A ``SentenceTransformerTrainer`` that keeps its batches."""
