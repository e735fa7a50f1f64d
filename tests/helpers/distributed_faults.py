"""Run by ``torchrun``: every process does what the scenario says and writes what it ended with.

PYTHONPATH=tests torchrun --nproc_per_node 2 tests/helpers/distributed_faults.py SCENARIO BERT_FOLDER OUTPUT_FOLDER
"""

import math
import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from helpers.tiny import LABELS, POSITIVES, make_bert_encoder, make_static_encoder, relevance_of
from helpers.training import tiny_arguments
from hf_xmc import XMCEvaluator, XMCTrainer, distributed, losses
from hf_xmc.training import checkpoints
from hf_xmc.training.mining import HardNegativeMiner

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
MODES = {
    "exact": {},
    "fresh": {"label_sample_fraction": 0.3},
    "bank": {"label_sample_fraction": 0.3, "label_bank_max_age": 5},
    "mined": {"num_hard_negatives": 2, "num_random_negatives": 2, "num_positives": 1},
}


def rows(positives=POSITIVES):
    texts = [f"text {i} about {' and '.join(LABELS[p] for p in ids)}" for i, ids in enumerate(positives)]
    return Dataset.from_dict({"text": texts, "label_ids": positives})


def trainer_of(encoder, folder, data=None, labels=LABELS, trainer_class=XMCTrainer, evaluator=None, **settings):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    args = tiny_arguments(folder, **{"label_chunk_size": 4, **defaults, **settings})
    loss = losses.DecoupledSoftmaxLoss()
    data = data or rows()
    trainer = trainer_class(encoder, args, data, labels=labels, loss=loss, evaluator=evaluator)
    assert trainer.accelerator.num_processes == WORLD_SIZE
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.loss.named_parameters()}


# Accumulation, and the step to stop at: an epoch has 4 batches on 2 processes and 3 on 3.
STOPS = {"exact": (2, 1), "fresh": (1, 2), "bank": (1, 3), "mined": (2, 1)}


def resume(bert_folder, folder):
    """Each mode, stopped: the weights with and without the stop."""
    found = {}
    for mode, (accumulation, step) in STOPS.items():
        ends = []
        for checkpoint in (None, str(folder / mode / f"checkpoint-{step}")):
            trainer = trainer_of(
                make_bert_encoder(bert_folder),
                folder / mode if checkpoint is None else folder / f"{mode}, again",
                label_mode=mode,
                gradient_accumulation_steps=accumulation,
                max_steps=step + 2,
                save_steps=step,
                **MODES[mode],
            )
            if mode == "mined":
                trainer.add_callback(HardNegativeMiner(trainer))
            trainer.train(resume_from_checkpoint=checkpoint)
            ends.append(weights(trainer))
        found[mode] = ends
    return found


def uneven(bert_folder, folder):
    """13 rows in batches that do not divide, and positives that all lie in the first process's labels."""
    found = {}
    for name, positives in (("uneven", POSITIVES), ("one shard", [[0], [1], [0, 1], [0], [1], [], [0]])):
        trainer = trainer_of(make_bert_encoder(bert_folder), folder / name, rows(positives), save_strategy="no")
        start = weights(trainer)
        trainer.train()
        end = weights(trainer)
        moved = sum(float((end[n] - start[n]).norm()) for n in start)
        found[name] = {"weights": end, "moved": moved, "steps": trainer.state.global_step}
    return found


def evaluation(bert_folder, folder):
    found = {}
    for num_rows in (97, 99):
        positives = [POSITIVES[i % 13] for i in range(num_rows)]
        texts = [f"text {i % 20} about {' and '.join(LABELS[p] for p in ids)}" for i, ids in enumerate(positives)]
        evaluator = XMCEvaluator(texts, relevance_of(positives), LABELS, batch_size=8)
        for kind in ("static", "bert"):
            encoder = make_static_encoder() if kind == "static" else make_bert_encoder(bert_folder)
            data = Dataset.from_dict({"text": texts, "label_ids": positives})
            trainer = trainer_of(encoder, folder, data, evaluator=evaluator, save_strategy="no", max_steps=1)
            found[f"{kind}, {num_rows}"] = {n: v for n, v in trainer.evaluate().items() if "@" in n or "num" in n}
    return found


class FaultyOnLast(XMCTrainer):
    """The loss of one process alone is infinite in the third step, its gradient is not; in the fifth both are NaN."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if RANK == WORLD_SIZE - 1 and self.state.global_step == 2:
            return loss + math.inf
        if RANK == WORLD_SIZE - 1 and self.state.global_step == 4:
            return loss * math.nan
        return loss


def nonfinite(bert_folder, folder):
    skipping = trainer_of(make_static_encoder(), folder / "skip", trainer_class=FaultyOnLast, on_nonfinite="skip")
    skipping.train()
    stopping = trainer_of(make_static_encoder(), folder / "stop", trainer_class=FaultyOnLast)
    message = ""
    try:
        stopping.train()
    except FloatingPointError as error:
        message = str(error)
    newest = checkpoints.latest_complete(folder / "stop").name
    return {"weights": weights(skipping), "steps": skipping.state.global_step, "message": message, "newest": newest}


class Dies(TrainerCallback):
    """The last process dies in step 4, by a signal or by an exception."""

    def __init__(self, way):
        self.way = way

    def on_step_begin(self, args, state, control, **kwargs):
        if RANK == WORLD_SIZE - 1 and state.global_step == 3:
            if self.way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this process cannot go on")


def dies(way, folder):
    settings = {"max_steps": 50, "ddp_timeout": 8}
    trainer = trainer_of(make_static_encoder(), folder / "run", **settings)
    trainer.add_callback(Dies(way))
    trainer.train()


def main(scenario, bert_folder, folder):
    folder = Path(folder)
    if scenario in ("killed", "raised"):
        dies(scenario, folder)
    elif scenario == "few labels":
        trainer_of(make_static_encoder(), folder, rows([[0], [0]]), labels=LABELS[:1])
    else:
        found = {f.__name__: f(bert_folder, folder / f.__name__) for f in (resume, uneven, evaluation, nonfinite)}
        torch.save({**found, "world_size": WORLD_SIZE}, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
