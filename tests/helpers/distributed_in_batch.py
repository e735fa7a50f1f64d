"""Run by ``torchrun``: a step of the stock trainer for each case; every process writes its batches and its weights.

PYTHONPATH=tests torchrun --nproc_per_node 2 tests/helpers/distributed_in_batch.py BERT_FOLDER OUTPUT_FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

from helpers.in_batch import LOSSES, TEMPERATURE, arguments, hard_negatives, rows
from helpers.tiny import LABELS, POSITIVES, make_bert_encoder, relevance_of
from helpers.training import StockRecording
from hf_xmc import XMCEvaluator, distributed

CACHES = {"": {}, ", cached": {"mini_batch_size": 2}, ", by tokens": {"mini_batch_num_tokens": 20}}
CASES = {
    f"{name}{cache}, accumulation {accumulation}": (name, {"gather_across_devices": True, **settings}, accumulation)
    for name in LOSSES
    for cache, settings in CACHES.items()
    for accumulation in (1, 2)
}
CASES |= {
    "decoupled, apart": ("decoupled", {}, 1),
    "bce, cached, apart": ("bce", {"mini_batch_size": 2}, 2),
}


def train(bert_folder, folder, name, settings, accumulation):
    queries = Dataset.from_dict({"text": [f"text {i} about" for i in range(13)], "label_ids": POSITIVES})
    dataset = rows(queries, hard_negatives=hard_negatives(1))
    encoder = make_bert_encoder(bert_folder)
    args = arguments(
        folder,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=True,
        eval_strategy="steps",
        eval_steps=1,
    )
    evaluator = XMCEvaluator(queries["text"], relevance_of(POSITIVES), LABELS)
    make, _, own = LOSSES[name]
    loss = make(encoder, temperature=TEMPERATURE, **own, **settings)
    trainer = StockRecording(encoder, args, dataset, loss=loss, evaluator=evaluator)
    trainer.train()
    return {
        "batches": trainer.batches,
        "weights": {n.replace("model.module.", "model."): p.detach() for n, p in loss.named_parameters()},
        "metrics": [entry for entry in trainer.state.log_history if "eval_P@5" in entry],
        "metrics_here": evaluator(encoder),
        "world_size": trainer.accelerator.num_processes,
    }


def main(bert_folder, output_folder):
    results = {name: train(bert_folder, Path(output_folder) / "run", *case) for name, case in CASES.items()}
    torch.save(results, Path(output_folder) / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.leave()
