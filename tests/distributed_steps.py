"""Run by ``torchrun``: some steps of training for each case; every process writes what it ended with.

torchrun --nproc_per_node 2 tests/distributed_steps.py BERT_FOLDER OUTPUT_FOLDER
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import LABELS, POSITIVES, make_bert_encoder, relevance_of
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from hf_xmc import (
    ExtremeMultilabelClassificationEvaluator,
    XMCTrainer,
    XMCTrainingArguments,
    losses,
    sharding,
    st_losses,
)

GLOBAL_BATCH = 6  # of 13 queries, against 11 labels
CASES = {
    "decoupled": (losses.DecoupledSoftmaxLoss, {}),
    "decoupled in chunks": (losses.DecoupledSoftmaxLoss, {"label_chunk_size": 2}),
    "decoupled, accumulated": (losses.DecoupledSoftmaxLoss, {"label_chunk_size": 3, "gradient_accumulation_steps": 2}),
    "softmax": (losses.SoftmaxLoss, {}),
    "soft top-k": (losses.SoftTopKLoss, {"label_chunk_size": 2}),
    "bce": (losses.BCELoss, {}),
}


def train(bert_folder, folder, loss, settings, world_size):
    queries = Dataset.from_dict(
        {
            "text": [f"text {i} about {' and '.join(LABELS[p] for p in ids)}" for i, ids in enumerate(POSITIVES)],
            "label_ids": POSITIVES,
            "label_scores": [[1.0 + i % 3 for i in ids] for ids in POSITIVES],
        }
    )
    args = XMCTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        dataloader_drop_last=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = XMCTrainer(make_bert_encoder(bert_folder), args, queries, labels=LABELS, loss=loss())
    values = []
    trainer.loss.register_forward_hook(lambda module, inputs, output: values.append(output.item()))
    trainer.train()
    weights = {name: p.detach() for name, p in trainer.loss.named_parameters()}
    return {"weights": weights, "losses": values, "world_size": trainer.accelerator.num_processes}


STOCK_CASES = {
    "gathered": (st_losses.DecoupledSoftmaxLoss, {"gather_across_devices": True}),
    "gathered, cached": (st_losses.SoftTopKLoss, {"gather_across_devices": True, "mini_batch_size": 2}),
    "gathered bce, cached": (st_losses.BCELoss, {"gather_across_devices": True, "mini_batch_size": 2}),
    "apart": (st_losses.DecoupledSoftmaxLoss, {}),
    "apart, bce, cached": (st_losses.BCELoss, {"mini_batch_size": 2}),
}


def train_stock(bert_folder, folder, loss, settings, world_size, apart=1):
    """In the trainer of sentence-transformers. ``apart``: one process in the place of several that gather nothing."""
    torch.manual_seed(7)
    queries = Dataset.from_dict({"text": [f"text {i} about" for i in range(13)], "label_ids": POSITIVES})
    hard = np.random.default_rng(0).integers(0, len(LABELS), (13, 1))
    drawn = st_losses.in_batch_dataset(queries, LABELS, hard_negatives=hard)
    rows = Dataset.from_list([drawn[i] for i in range(len(drawn))])
    encoder = make_bert_encoder(bert_folder)
    args = SentenceTransformerTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=GLOBAL_BATCH // world_size // apart,
        gradient_accumulation_steps=apart,
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        dataloader_drop_last=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=2,
        disable_tqdm=True,
    )
    evaluator = ExtremeMultilabelClassificationEvaluator(queries["text"], relevance_of(POSITIVES), LABELS)
    loss = loss(encoder, **settings)
    trainer = SentenceTransformerTrainer(encoder, args, rows, loss=loss, evaluator=evaluator)
    trainer.train()
    weights = {name.replace("model.module.", "model."): p.detach() for name, p in loss.named_parameters()}
    metrics = [entry for entry in trainer.state.log_history if "eval_P@5" in entry]
    return {"weights": weights, "metrics": metrics, "world_size": trainer.accelerator.num_processes}


def collectives():
    """Ragged rows and columns, gathered; a gradient through the gathering; labels that do not divide."""
    rank, size = sharding.rank(), sharding.world_size()
    mine = torch.full((rank + 1, rank + 2), float(rank))
    queries = torch.full((rank + 1, 3), 1.0, requires_grad=True)
    gathered = sharding.gather_queries(queries)
    (gathered * (rank + 1) * torch.arange(len(gathered))[:, None]).sum().backward()
    return {"rows": sharding.gather_rows(mine, fill=-1), "gradient": queries.grad, "size": size}


def main(bert_folder, output_folder):
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    results = {}
    for name, (loss, settings) in CASES.items():
        results[name] = train(bert_folder, Path(output_folder) / "run", loss, settings, world_size)
    for name, (loss, settings) in STOCK_CASES.items():
        results[name] = train_stock(bert_folder, Path(output_folder) / "run", loss, settings, world_size)
    results["collectives"] = collectives()
    torch.save(results, Path(output_folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
